"""Inputs that are rounded as they come, or to a range that is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.format.grid import from_groups, to_groups
from moqa.kernels import PackedMatrix
from moqa.kernels.reference import ReferenceKernels
from moqa.qat.straight import on_grid, through

# percentiles of the first batch's values that a trained range begins with, by bits (SiLQ, arXiv 2507.16933)
_BEGINS = {4: 0.999, 8: 0.9999}
# to which kernels round inputs, every group of a row with its own range, and the steps of the largest value there
KERNEL_BITS, _STEPS = 8, 127.0
# steps below it are zero there
_SMALLEST = 1e-36


@dataclass(frozen=True)
class Inputs:
    """How the inputs of layers are rounded.

    >>> Inputs(8).bits
    8

    Attributes:
        bits: 4 or 8.
        trained: whether their range is trained, one for each layer; else every group of a row, or every image, has its
            own.
    """

    bits: int
    trained: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _BEGINS:
            raise MoqaError(f"inputs of {self.bits} bits are not supported", "give 4 or 8")

    def module(self, group_size: int | None) -> nn.Module:
        """What rounds the inputs of one layer.

        Args:
            group_size: of its weights; None for a convolution.
        """
        return TrainedRange(self.bits) if self.trained else OwnRange(self.bits, group_size)


class OwnRange(nn.Module):
    """Rounds values to 127ths of the largest among them, as kernels round the inputs of packed weights.

    With 4 bits only 15 of the 255 values are left, those next to equal distances: kernels round them to themselves.

    >>> OwnRange(8, group_size=32)(torch.tensor([[1.0, 0.5]])) * 127
    tensor([[127.,  64.]])
    >>> OwnRange(4, group_size=32)(torch.tensor([[1.0, 0.5]])) * 127
    tensor([[127.,  73.]])

    Args:
        bits: of a value, with its sign.
        group_size: of the values in a row that are rounded together; None for all of an image.
    """

    def __init__(self, bits: int, group_size: int | None) -> None:
        super().__init__()
        self.top, self.group_size = 2.0 ** (bits - 1) - 1, group_size

    def forward(self, x: Tensor) -> Tensor:
        """The same, rounded: [..., features], of a convolution [batch, ...]; gradients pass through."""
        values = x.detach()
        groups = values.flatten(1)[:, None] if self.group_size is None else to_groups(values, self.group_size)
        step = groups.abs().amax(-1, keepdim=True) / _STEPS
        inverse = torch.where(step >= _SMALLEST, 1 / step, 0.0)
        each = _STEPS / self.top
        rounded = ((groups * inverse / each).round() * each).round() * step
        flat = rounded[:, 0] if self.group_size is None else from_groups(rounded, x.shape[-1])
        return through(x, flat.reshape(x.shape))


class RoundingKernels(ReferenceKernels):
    """Reference kernels that round inputs as native kernels do; gradients pass through, also to weights that are held.

    >>> RoundingKernels().linear(matrix, torch.randn(3, 256)).shape
    torch.Size([3, 256])
    """

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ProductKernels`."""
        scheme = matrix.scheme
        rounded = x if scheme.is_unquantized else OwnRange(KERNEL_BITS, scheme.group_size)(x)
        return super().linear(matrix, rounded, bias)


class TrainedRange(nn.Module):
    """Rounds all values to a range that is trained (LSQ, arXiv 1902.08153).

    It begins with the first batch that it sees: from zero, if no value is negative, else symmetric.

    >>> rounded = TrainedRange(4)(torch.rand(8, 16))
    >>> len(rounded.unique()) <= 16
    True

    Args:
        bits: of a value.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits
        self.step = nn.Parameter(torch.zeros(()))
        self.register_buffer("_first", torch.zeros(()))
        self.register_buffer("_offset", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> the same, rounded."""
        first = self.get_buffer("_first")
        if not bool(first > 0):
            self._begin(x.detach())
        top = torch.tensor(2.0**self._bits - 1)
        calm = float(x.numel() * top) ** -0.5 / first.square()
        step = first * (1 + through(self.step * calm, self.step.detach()))
        flat = x.reshape(1, -1)
        offset = self.get_buffer("_offset")
        return on_grid(flat, step.reshape(1, 1), offset.reshape(1, 1), top.reshape(1, 1), flat.shape[1]).reshape(
            x.shape
        )

    @torch.no_grad()
    def start_again(self) -> None:
        """Forget the range: it begins with the next batch."""
        self.get_buffer("_first").zero_()
        self.step.zero_()

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        values = x.flatten().float()
        # a sample of them: torch's quantile takes no more than 16 million
        values = values[:: max(1, len(values) // 2**20)].abs()
        largest = values.quantile(_BEGINS[self._bits])
        has_sign = bool((x < 0).any())
        levels = 2 ** (self._bits - has_sign) - 1
        self.get_buffer("_first").copy_((largest if largest > 0 else values.max()).clamp_min(1e-6) / levels)
        self.get_buffer("_offset").fill_(2.0 ** (self._bits - 1) if has_sign else 0.0)
