"""Weights that are trained on the grid on which they are stored."""

import torch
from torch import Tensor, nn

from moqa.format.grid import ZERO_STEPS, Grid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.methods.grid import fit_grid
from moqa.qat.straight import as_stored, on_grid, through, whole

# a step of the optimizer moves a zero-point by about its rate times so many 255ths of the range
_ZERO = 8.0


class WeightGrid(nn.Module):
    """Rounds a weight to a grid whose scales and zero-points are trained with it.

    >>> linear = nn.Linear(64, 32)
    >>> grid = WeightGrid(linear.weight, Scheme(width=3), rows=32)
    >>> nn.utils.parametrize.register_parametrization(linear, "weight", grid).weight.shape
    torch.Size([32, 64])

    It is a parametrization (`torch.nn.utils.parametrize`): whatever reads the module's weight gets the numbers that a
    file with `stored` would hold, bit for bit. Scales begin as rounding to nearest would store them.

    Args:
        weight: its first values, of any shape.
        scheme: of integers.
        rows: of the matrix that the weight is stored as.

    Under SGD, a scale moves as in LSQ (arXiv 1902.08153, section 2.2): its gradient is divided by the root of the
    number of its weights times the largest integer.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, rows: int) -> None:
        super().__init__()
        self.scheme, self._rows = scheme, rows
        shape = (rows, -(-weight.numel() // rows // scheme.group_size))
        self.register_buffer("_scale", torch.zeros(shape, dtype=getattr(torch, scheme.scale_dtype)))
        self.register_buffer("_zero", None if scheme.symmetric else torch.zeros(shape, dtype=torch.uint8))
        # relative to the first scales, so that one learning rate suits weights of any size
        self.growth = nn.Parameter(torch.zeros(shape))
        self.shift = None if scheme.symmetric else nn.Parameter(torch.zeros(shape))
        self.register_buffer("_top", torch.tensor(2.0**scheme.width - 1).expand(shape), persistent=False)
        each = min(scheme.group_size, weight.numel() // rows)
        self._calm = float(each * (2**scheme.width - 1)) ** -0.5
        self.begin(weight)

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Take the grid on which rounding to nearest would store a weight, and forget what was learned."""
        self.take(fit_grid(weight.detach().float().reshape(self._rows, -1), self.scheme).grid)

    @torch.no_grad()
    def take(self, grid: Grid) -> None:
        """Take a grid, and forget what was learned."""
        self.get_buffer("_scale").copy_(grid.scale)
        self.growth.zero_()
        if grid.zero is not None and self.shift is not None:
            self.get_buffer("_zero").copy_(grid.zero)
            self.shift.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it would be stored, in its own shape and dtype."""
        grid = self._grid()
        matrix = weight.float().reshape(self._rows, -1)
        found = on_grid(matrix, grid.scale, grid.offset(), grid.top, grid.group_size)
        return found.reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        """Tensors by suffix, see `Scheme.tensors`.

        Args:
            weight: as the optimizer has it, before it is rounded.
        """
        grid = self._grid()
        zero = None if grid.zero is None else grid.zero.to(torch.uint8)
        final = Grid(grid.scale.to(self.get_buffer("_scale").dtype), zero, grid.group_size, grid.top)
        integers = final.encode(weight.float().reshape(self._rows, -1))
        return final.stored(pack(integers, self.scheme.width))

    def _grid(self) -> Grid:
        first, zero = self.get_buffer("_scale"), None
        start = first.float()
        # LSQ's step in terms of a relative one; with an optimizer that normalizes gradients, factors do not matter
        calm = self._calm / start.square().clamp_min(1e-12)
        growth = through(self.growth * calm, self.growth.detach())
        if self.shift is not None:
            shift = through(self.shift * self._calm, self.shift.detach()) * _ZERO * ZERO_STEPS / self.get_buffer("_top")
            zero = whole(self.get_buffer("_zero").float() + shift, ZERO_STEPS)
        scale = as_stored(start * (1 + growth), first.dtype)
        return Grid(scale, zero, self.scheme.group_size, self.get_buffer("_top"))
