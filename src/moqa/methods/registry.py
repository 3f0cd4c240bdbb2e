"""Quantization methods: a registry of functions from weights and inputs to what is stored."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.grid import Grid
from moqa.format.scheme import Scheme
from moqa.methods.inputs import Inputs


@dataclass(frozen=True)
class Job:
    """A stack of equally large problems.

    Attributes:
        weights: [n, rows, in] float32; rows of all units that share an input space.
        widths: [n, rows] bits, int.
        inputs: one per stack entry; empty for methods that need no data.
        scheme: group size, symmetry, scale dtype.
    """

    weights: Tensor
    widths: Tensor
    inputs: list[Inputs]
    scheme: Scheme


@dataclass(frozen=True)
class Result:
    """Stored integers [n, rows, in] with their grid."""

    integers: Tensor
    grid: Grid

    def decode(self) -> Tensor:
        """[n, rows, in] weights as they are stored, float32."""
        return self.grid.decode(self.integers)


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: as users type it.
        needs_data: whether it looks at inputs.
        run: the function.
    """

    name: str
    needs_data: bool
    run: Callable[[Job], Result]


METHODS: dict[str, Method] = {}


def method(name: str, needs_data: bool) -> Callable[[Callable[[Job], Result]], Callable[[Job], Result]]:
    """Register a quantization method."""

    def register(run: Callable[[Job], Result]) -> Callable[[Job], Result]:
        METHODS[name] = Method(name, needs_data, run)
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
