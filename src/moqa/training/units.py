"""Units that are trained: what is stored of them beside integers or codes changes, and takes no more bytes."""

from typing import Protocol

import torch
from torch import Tensor, nn

from moqa.format.grid import ZERO_STEPS, Grid
from moqa.format.levels import FACTORS, LevelGrid, unpack_factors
from moqa.format.planes import unpack, untile_rows
from moqa.kernels import PackedMatrix
from moqa.qat.straight import as_stored, whole
from moqa.qat.weights import WeightGrid

# Steps of the optimizer are about as long as its rate: of a scale relative to its value, of zero-points and factors in
# their own units, of which there are 255 and 63.
_ZERO, _FACTOR = 8.0, 16.0
# share of a step from its middle to where the next one begins, a little less than half
_INSIDE = 0.49


class TrainedUnit(Protocol):
    """One packed unit whose scales are trained.

    >>> unit = trained_unit(matrix)
    >>> torch.equal(unit(), matrix.dense())
    True

    Codes stay as they are, and integers unless weights are trained, too. Stored numbers are rounded in every step as
    they are in a file, and gradients pass through the rounding (straight-through estimator).
    """

    def __call__(self) -> Tensor:
        """[out, in] the weights that its file would hold now, with gradients, float32."""

    def parameters(self) -> "list[nn.Parameter]":
        """What is trained; all zero at the beginning."""

    def stored(self) -> dict[str, Tensor]:
        """Tensors by suffix, see `Scheme.tensors`."""


def trained_unit(matrix: PackedMatrix, original: Tensor | None = None) -> "TrainedUnit | None":
    """What trains a unit; None if it has no scales: it is not quantized.

    Args:
        matrix: the unit.
        original: [out, in] its original weights, to train integers, too; None leaves them as they are.
    """
    if matrix.scheme.is_unquantized:
        return None
    if original is not None and not matrix.scheme.is_coded:
        return _WeightUnit(matrix, original)
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


class _WeightUnit:
    """Of the encoding `int`: weights, scales and zero-points (LSQ, arXiv 1902.08153).

    A weight begins where the original's is, or at the nearest end of the step to which the checkpoint rounds it: the
    first integers are those of the checkpoint, whatever method chose them.
    """

    def __init__(self, matrix: PackedMatrix, original: Tensor) -> None:
        scheme, (out, features) = matrix.scheme, matrix.shape
        tensors, stored = dict(matrix.named_buffers()), matrix.dense()
        scale = untile_rows(tensors["scale"], out)
        zero = None if scheme.symmetric else untile_rows(tensors["zero"], out)
        top = torch.tensor(2.0**scheme.width - 1).expand(scale.shape)
        self._grid = WeightGrid(stored, scheme, out)
        self._grid.take(Grid(scale, zero, scheme.group_size, top))
        self._step = scale.float().repeat_interleave(scheme.group_size, 1)[:, :features]
        inside = _INSIDE * self._step
        self._start = original.float().clamp(stored - inside, stored + inside)
        self._change = nn.Parameter(torch.zeros(matrix.shape))

    def __call__(self) -> Tensor:
        found: Tensor = self._grid(self._weights())
        return found

    def parameters(self) -> list[nn.Parameter]:
        return [*self._grid.parameters(), self._change]

    def stored(self) -> dict[str, Tensor]:
        return self._grid.stored(self._weights())

    def _weights(self) -> Tensor:
        return self._start + self._change * self._step


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
