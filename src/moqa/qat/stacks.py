"""Stacks of experts that are trained on the grids on which each of their matrices is stored."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, ProductKernels
from moqa.models.experts import Experts, ParameterWeights, projection_rows
from moqa.qat.inputs import Inputs
from moqa.qat.weights import WeightGrid
from moqa.runtime.packed import PackedExperts

# of an expert's two products
GATE_UP, DOWN = "gate_up_proj", "down_proj"


class StackGrid(nn.Module):
    """Rounds every matrix of a stacked parameter to a grid of its own: a parametrization, as `WeightGrid`.

    >>> schemes = {(expert, "down_proj"): Scheme(width=3) for expert in range(16)}
    >>> grid = StackGrid(view.experts(0), "down_proj", schemes)
    >>> grid(view.experts(0).down_proj).shape
    torch.Size([16, 256, 256])

    Args:
        experts: a stack of experts.
        parameter: `gate_up_proj` or `down_proj`.
        schemes: (expert, projection) -> scheme of integers, of all matrices of the parameter.
    """

    def __init__(self, experts: Experts, parameter: str, schemes: Mapping[tuple[int, str], Scheme]) -> None:
        super().__init__()
        self._is_transposed, self._is_concatenated = bool(experts.is_transposed), bool(experts.is_concatenated)
        self._rows = projection_rows(experts) if parameter == GATE_UP else {DOWN: slice(None)}
        stack = getattr(experts, parameter).detach()
        self._grids: Any = nn.ModuleDict({
            projection: nn.ModuleList(
                WeightGrid(matrix, schemes[expert, projection], len(matrix))
                for expert, matrix in enumerate(self._of(stack, projection))
            )
            for projection in self._rows
        })  # fmt: skip

    def places(self) -> dict[tuple[int, str], tuple[WeightGrid, Callable[[Tensor], Tensor]]]:
        """(expert, projection) -> its grid, and its [out, in] matrix as a function of the parameter."""
        return {
            (expert, projection): (grid, partial(self._matrix, expert, projection))
            for projection, grids in self._grids.items()
            for expert, grid in enumerate(grids)
        }

    def _matrix(self, expert: int, projection: str, stack: Tensor) -> Tensor:
        return self._of(stack, projection)[expert]

    def forward(self, stack: Tensor) -> Tensor:
        """The stack as it would be stored, in its own shape and dtype."""
        parts = [
            torch.stack([grid(matrix) for grid, matrix in zip(grids, self._of(stack, projection), strict=True)])
            for projection, grids in self._grids.items()
        ]
        joined = torch.cat(parts, 1) if self._is_concatenated else torch.stack(parts, 2).flatten(1, 2)
        return joined.mT if self._is_transposed else joined

    def _of(self, stack: Tensor, projection: str) -> tuple[Tensor, ...]:
        """[out, in] matrices of a projection, by expert."""
        return (stack.mT if self._is_transposed else stack)[:, self._rows[projection]].unbind(0)


class RoundedInputs(nn.Module):
    """What rounds the inputs of the products of all experts of a layer.

    Args:
        inputs: how.
        schemes: (expert, projection) -> scheme; inputs are rounded by its group size.
    """

    def __init__(self, inputs: Inputs, schemes: Mapping[tuple[int, str], Scheme]) -> None:
        super().__init__()
        # one range of a layer is trained for each of the two inputs that experts have; others have no state
        self._ranges = (
            nn.ModuleDict({name: inputs.module(None) for name in (GATE_UP, DOWN)}) if inputs.trained else None
        )
        self._own = {size: inputs.module(size) for size in {scheme.group_size for scheme in schemes.values()}}
        self._sizes = {place: scheme.group_size for place, scheme in schemes.items()}

    def forward(self, x: Tensor, expert: int, projection: str) -> Tensor:
        """[tokens, in] -> the same, as `projection` of an expert multiplies it."""
        if self._ranges is not None:
            rounded: Tensor = self._ranges[DOWN if projection == DOWN else GATE_UP](x)
            return rounded
        own: Tensor = self._own[self._sizes[expert, projection]](x)
        return own

    def alike(self, expert: int) -> bool:
        """Whether gate and up of an expert get the same rounded inputs."""
        return self._ranges is not None or self._sizes[expert, "gate_proj"] == self._sizes[expert, "up_proj"]


class RoundingWeights(ParameterWeights):
    """The parameters of a stack of experts whose inputs are rounded by its `moqa_inputs`, see `ExpertWeights`."""

    def __init__(self, module: Experts) -> None:
        super().__init__(module)
        self._module, self._inputs = module, module.moqa_inputs

    def gate_up(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        found = super().gate_up(expert, self._inputs(x, expert, "gate_proj"))
        if self._inputs.alike(expert):
            return found
        of_up = super().gate_up(expert, self._inputs(x, expert, "up_proj"))
        is_up = torch.zeros(found.shape[-1], dtype=torch.bool)
        is_up[projection_rows(self._module, len(is_up) // 2)["up_proj"]] = True
        return torch.where(is_up, of_up, found)

    def down(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertWeights`."""
        return super().down(expert, self._inputs(x, expert, DOWN))


class RoundingExperts(PackedExperts):
    """Packed experts whose inputs are rounded as in training, and then multiplied product by product.

    Args:
        experts: the module whose parameters are replaced.
        matrices: (expert, projection) -> matrix.
        kernels: that multiply.
        inputs: what rounds them.
    """

    def __init__(
        self, experts: Experts, matrices: Mapping[tuple[int, str], PackedMatrix], kernels: ProductKernels,
        inputs: RoundedInputs,
    ) -> None:  # fmt: skip
        super().__init__(experts, matrices, kernels)
        self.inputs = inputs

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """None: what kernels compute in one call, they round by themselves."""

    def _product(self, expert: int, projection: str, x: Tensor) -> Tensor:
        return super()._product(expert, projection, self.inputs(x, expert, projection))


def owner_of(experts: Experts, stacked: str) -> tuple[nn.Module, str]:
    """The module that has a stacked parameter as its own, and the parameter's name there.

    >>> owner_of(view.experts(0), "down_proj")[1]
    'down_proj'
    """
    parts = (experts, *getattr(experts, "owners", {}).values())
    wanted = getattr(experts, stacked)
    return next(
        (part, name) for part in parts for name, own in part.named_parameters(recurse=False) if own is wanted
    )  # fmt: skip
