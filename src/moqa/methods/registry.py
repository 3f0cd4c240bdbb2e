"""Quantization methods: a registry of functions from weights and inputs to what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moqa.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from moqa.calibration.inputs import InputStatistics
    from moqa.format.scheme import Scheme
    from moqa.methods.result import SolveResult

DEFAULT_METHOD = "gptq"


@dataclass(frozen=True)
class SolveBatch:
    """A stack of problems of the same shape.

    Attributes:
        weights: [n, rows, in] float32; rows of all units that share an input space.
        widths: [n, rows] bits, int.
        inputs: one per stack entry; methods that need no data ignore them.
        scheme: encoding, group size, symmetry, scale dtype.
        parts: rows of each unit; their sum is `rows`, and a unit has one width.
        outputs: of each stack entry, for each of its units the Gram matrix of the gradients at its outputs, float32, or
            None; empty if there are none at all.
        near: [n, rows, in] values that every weight has to stay next to on its grid (`Neighbours`), float32; None if
            weights may take any integer. Grids alone can hold it.
    """

    weights: Tensor
    widths: Tensor
    inputs: list[InputStatistics]
    scheme: Scheme
    parts: tuple[int, ...]
    outputs: list[list[Tensor | None]] = field(default_factory=list)
    near: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: as users type it.
        run: the function.
        store: only of methods that use no inputs: the same for one matrix, directly to what is stored; weights
            [out, in] and their scheme -> tensors by suffix, see `Scheme.tensors`.
        affinity: power of the gate weight by which an expert's inputs are multiplied: 1 for the error of the block's
            output, 0 for inputs as they are.
    """

    name: str
    run: Callable[[SolveBatch], SolveResult]
    store: Callable[[Tensor, Scheme], dict[str, Tensor]] | None = None
    affinity: float = 1.0

    @property
    def needs_data(self) -> bool:
        """Whether it uses inputs."""
        return self.store is None


# to add a method, add a module of its name, and its name here
_MODULES = {
    "gptq": "moqa.methods.gptq", "rtn": "moqa.methods.rtn", "gptq-affinity": "moqa.methods.gptq_affinity",
    "gptq-plain": "moqa.methods.gptq_plain",
}  # fmt: skip
METHODS: Registry[Method] = Registry("--method", _MODULES)
method = METHODS.decorator(Method)
