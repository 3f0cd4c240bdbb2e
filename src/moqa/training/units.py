"""Units that are trained: what is stored of them beside integers or codes changes, and takes no more bytes."""

from typing import Protocol

import torch
from torch import Tensor, nn

from moqa.format.grid import ZERO_STEPS, Grid
from moqa.format.levels import FACTORS, LevelGrid, unpack_factors
from moqa.format.planes import unpack, untile_rows
from moqa.kernels import PackedMatrix
from moqa.qat.straight import as_stored, whole

# Steps of the optimizer are about as long as its rate: of a scale relative to its value, of zero-points and factors in
# their own units, of which there are 255 and 63.
_ZERO, _FACTOR = 8.0, 16.0


class TrainedUnit(Protocol):
    """One packed unit whose scales are trained.

    >>> unit = trained_unit(matrix)
    >>> torch.equal(unit(), matrix.dense())
    True

    Integers and codes stay as they are. Stored numbers are rounded in every step as they are in a file, and gradients
    pass through the rounding (straight-through estimator).
    """

    def __call__(self) -> Tensor:
        """[out, in] the weights that its file would hold now, with gradients, float32."""

    def parameters(self) -> "list[nn.Parameter]":
        """What is trained; all zero at the beginning."""

    def stored(self) -> dict[str, Tensor]:
        """Tensors by suffix, see `Scheme.tensors`."""


def trained_unit(matrix: PackedMatrix) -> "TrainedUnit | None":
    """What trains a unit; None if it has no scales: it is not quantized."""
    if matrix.scheme.is_unquantized:
        return None
    return _CodedUnit(matrix) if matrix.scheme.is_coded else _IntegerUnit(matrix)


class _IntegerUnit:
    """Of the encoding `int`: scales and zero-points of all groups."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._planes, self._size, out = matrix.planes, matrix.scheme.group_size, matrix.shape[0]
        self._integers = unpack(matrix.planes, matrix.scheme.width, matrix.shape)
        self._scale = untile_rows(matrix.get_buffer("scale"), out)
        self._top = torch.tensor(2.0**matrix.scheme.width - 1).expand(self._scale.shape)
        self._growth = nn.Parameter(torch.zeros(self._scale.shape))
        self._zero, self._shift = None, None
        if not matrix.scheme.symmetric:
            self._zero = untile_rows(matrix.get_buffer("zero"), out)
            self._shift = nn.Parameter(torch.zeros(self._scale.shape))

    def __call__(self) -> Tensor:
        return self._grid().decode(self._integers)

    def parameters(self) -> list[nn.Parameter]:
        return [self._growth, *([] if self._shift is None else [self._shift])]

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        grid = self._grid()
        zero = None if grid.zero is None else grid.zero.to(torch.uint8)
        return Grid(grid.scale.to(self._scale.dtype), zero, self._size, self._top).stored(self._planes)

    def _grid(self) -> Grid:
        zero = None
        if self._zero is not None and self._shift is not None:
            zero = whole(self._zero.float() + self._shift * _ZERO * ZERO_STEPS / self._top, ZERO_STEPS)
        return Grid(as_stored(self._scale.float() * self._growth.exp(), self._scale.dtype), zero, self._size, self._top)


class _CodedUnit:
    """Of the encodings `table` and `trellis`: scales of all rows and factors of all groups."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._planes, self._scheme, (self._rows, features) = matrix.planes, matrix.scheme, matrix.shape
        # with the rows that fill up the last tile: levels of others depend on their codes
        self._scale = matrix.get_buffer("scale").flatten()
        self._factor = unpack_factors(matrix.get_buffer("factor"), len(self._scale))
        self._width = torch.full(self._scale.shape, matrix.scheme.width, dtype=torch.uint8)
        codes = unpack(matrix.planes, matrix.scheme.width, (len(self._scale), features))
        self._levels = self._grid_of(self._scale, self._factor).levels_of(codes).to(torch.int8)
        self._growth = nn.Parameter(torch.zeros(self._scale.shape))
        self._change = nn.Parameter(torch.zeros(self._factor.shape))

    def __call__(self) -> Tensor:
        return self._grid().scaled(self._levels.float())[: self._rows]

    def parameters(self) -> list[nn.Parameter]:
        # the factor of a row's only group says nothing that its scale does not
        return [self._growth, *([self._change] if self._factor.shape[1] > 1 else [])]

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        grid = self._grid()
        stored = self._grid_of(grid.scale.to(self._scale.dtype), grid.factor.to(torch.uint8))
        return stored.stored(self._planes)

    def _grid(self) -> LevelGrid:
        factor = whole(self._factor.float() + self._change * _FACTOR, FACTORS)
        return self._grid_of(as_stored(self._scale.float() * self._growth.exp(), self._scale.dtype), factor)

    def _grid_of(self, scale: Tensor, factor: Tensor) -> LevelGrid:
        scheme = self._scheme
        return LevelGrid(scheme.encoding, scale, factor, scheme.group_size, self._width, scale.shape)
