"""What a method found: the weights it stands for, and how it is stored."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moqa.format.grid import Grid
from moqa.format.planes import by_suffix
from moqa.kernels import find_grid_kernels


class SolveResult(Protocol):
    """What a method found for a batch; it knows what it stands for and how it is stored."""

    def decode(self) -> Tensor:
        """[n, rows, in] weights as they are stored, float32."""

    def __getitem__(self, index: Any) -> "SolveResult":
        """A part: an entry and some of its rows."""

    def stored(self, width: int) -> dict[str, Tensor]:
        """Tensors by suffix, see `Scheme.tensors`, of a part that is one [rows, in] matrix.

        Args:
            width: of the unit that the matrix belongs to.
        """


@dataclass(frozen=True)
class GridResult:
    """Integers [n, rows, in] with their grid."""

    integers: Tensor
    grid: Grid

    def decode(self) -> Tensor:
        """See `SolveResult`."""
        return self.grid.decode(self.integers)

    def __getitem__(self, index: Any) -> "GridResult":
        return GridResult(self.integers[index], self.grid[index])

    def stored(self, width: int) -> dict[str, Tensor]:
        """See `SolveResult`."""
        return by_suffix(
            find_grid_kernels(self.integers.device).pack(self.integers, width), self.grid.scale, self.grid.zero
        )
