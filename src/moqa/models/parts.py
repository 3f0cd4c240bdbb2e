"""Linear layers and experts whose parameters belong to other modules."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear


class LinearPart(nn.Module):
    """One matrix of a module one of whose parameters holds several, each multiplied with its own inputs.

    >>> LinearPart(nn.Linear(16, 8), slice(4, 8))(torch.ones(3, 16)).shape
    torch.Size([3, 4])

    Args:
        whole: the module; it stays the owner of the parameter.
        place: of the matrix in the parameter.
        name: of the parameter.
    """

    bias = None

    def __init__(self, whole: nn.Module, place: slice | int, name: str = "weight") -> None:
        super().__init__()
        self._whole, self.place = (whole,), place  # in a tuple: a part must not register its whole as a submodule
        self._name = name

    @property
    def weight(self) -> Tensor:
        """[out, in] view of the matrix."""
        return self.parameter[self.place]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that it is a part of."""
        return self._whole[0].get_parameter(self._name)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight)


class ExpertsOf(nn.Module):
    """Experts whose stacked parameters are the `weight` of two other modules, see `moqa.models.experts`.

    >>> from types import SimpleNamespace
    >>> gate_up, down = SimpleNamespace(weight=torch.ones(4, 32, 8)), SimpleNamespace(weight=torch.ones(4, 8, 16))
    >>> ExpertsOf(gate_up, down, nn.SiLU()).num_experts
    4

    Args:
        gate_up: owner of [experts, 2 * width, features], gates first.
        down: owner of [experts, features, width].
        activation: function that is applied to the gates.

    Attributes:
        owners: of the parameters, by their names here.
    """

    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.owners = {"gate_up_proj": gate_up, "down_proj": down}  # in a dict: they belong to another module
        self.num_experts, self._activation = len(self.gate_up_proj), (activation,)

    @property
    def gate_up_proj(self) -> Any:
        """[experts, 2 * width, features] parameter."""
        return self.owners["gate_up_proj"].weight

    @property
    def down_proj(self) -> Any:
        """[experts, features, width] parameter."""
        return self.owners["down_proj"].weight

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gated(self._activation[0], gate_up)


def gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """[tokens, 2 * width] gates, then what they gate -> [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
