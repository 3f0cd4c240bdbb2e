"""The result of a method: the weights that it represents, and how it is stored."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moqa.format.grid import Grid
from moqa.format.levels import LevelGrid
from moqa.kernels import find_grid_kernels


class SolveResult(Protocol):
    """The result of a method for a batch: it can be decoded to weights, and be stored."""

    def decode(self) -> Tensor:
        """[n, rows, in] weights that the result represents, float32."""

    def __getitem__(self, index: Any) -> "SolveResult":
        """A part of it: an entry and some of its rows."""

    def stored(self, width: int) -> dict[str, Tensor]:
        """Tensors by suffix, see `Scheme.tensors`, of a part that is one [rows, in] matrix.

        Args:
            width: of the unit that the matrix belongs to.
        """


@dataclass(frozen=True)
class GridResult:
    """Integers [n, rows, in] with their grid."""

    integers: Tensor
    grid: Grid | LevelGrid

    def decode(self) -> Tensor:
        """See `SolveResult`."""
        return self.grid.decode(self.integers)

    def __getitem__(self, index: Any) -> "GridResult":
        return GridResult(self.integers[index], self.grid[index])

    def stored(self, width: int) -> dict[str, Tensor]:
        """See `SolveResult`."""
        return self.grid.stored(find_grid_kernels(self.integers.device).pack(self.integers, width))
