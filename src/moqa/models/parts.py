"""Several matrices in one parameter, each multiplied with inputs of its own: seen as linear layers of their own."""

from torch import Tensor, nn
from torch.nn.functional import linear


class LinearPart(nn.Module):
    """One matrix of a module whose `weight` holds several.

    >>> LinearPart(module, slice(1024, 2048))(torch.randn(3, 4096)).shape
    torch.Size([3, 1024])

    Args:
        whole: the module; it stays the owner of the parameter.
        place: of the matrix in its weight.
    """

    bias = None

    def __init__(self, whole: nn.Module, place: slice | int) -> None:
        super().__init__()
        self._whole, self.place = (whole,), place  # in a tuple: a part must not own what it is a part of

    @property
    def weight(self) -> Tensor:
        """[out, in] view of the matrix."""
        return self._whole[0].get_parameter("weight")[self.place]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight)
