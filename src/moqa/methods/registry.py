"""Quantization methods: a registry of functions from weights and inputs to what is stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moqa.calibration.inputs import InputStatistics
from moqa.errors import MoqaError
from moqa.format.grid import Grid
from moqa.format.planes import by_suffix
from moqa.format.scheme import Scheme
from moqa.kernels import find_kernels


@dataclass(frozen=True)
class SolveBatch:
    """A stack of equally large problems.

    Attributes:
        weights: [n, rows, in] float32; rows of all units that share an input space.
        widths: [n, rows] bits, int.
        inputs: one per stack entry; methods that need no data do not look at them.
        scheme: group size, symmetry, scale dtype.
    """

    weights: Tensor
    widths: Tensor
    inputs: list[InputStatistics]
    scheme: Scheme


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
        return by_suffix(find_kernels().pack(self.integers, width), self.grid.scale, self.grid.zero)


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: as users type it.
        run: the function.
        store: of methods that look at no inputs: the same for one matrix, straight to what is stored; weights [out, in]
            and their scheme -> tensors by suffix, see `Scheme.tensors`.
    """

    name: str
    run: Callable[[SolveBatch], SolveResult]
    store: Callable[[Tensor, Scheme], dict[str, Tensor]] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether it looks at inputs."""
        return self.store is None


METHODS: dict[str, Method] = {}


def method(
    name: str, store: Callable[[Tensor, Scheme], dict[str, Tensor]] | None = None
) -> Callable[[Callable[[SolveBatch], SolveResult]], Callable[[SolveBatch], SolveResult]]:
    """Register a quantization method, see `Method`."""

    def register(run: Callable[[SolveBatch], SolveResult]) -> Callable[[SolveBatch], SolveResult]:
        METHODS[name] = Method(name, run, store)
        return run

    return register


def find_method(name: str) -> Method:
    """A method by the name that the user typed.

    Raises:
        MoqaError: if there is none.
    """
    if name not in METHODS:
        raise MoqaError(f"--method {name} is unknown", f"there are {', '.join(sorted(METHODS))}")
    return METHODS[name]
