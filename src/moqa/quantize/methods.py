"""Quantization methods: a registry of functions from weights and inputs to what is stored."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.format.grid import Grid
from moqa.format.scheme import Scheme


@dataclass
class Inputs:
    """What the units of one input space were multiplied with: weighted Gram matrices of their inputs.

    Attributes:
        fit: [in, in] sum of x x^T over samples that may be fitted on, float32.
        check: [in, in] the same over other samples, by which results are compared.
        tokens: how many inputs `fit` saw.
    """

    fit: Tensor
    check: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int) -> "Inputs":
        """No input seen yet."""
        return cls(torch.zeros(features, features), torch.zeros(features, features))

    def add(self, x: Tensor, share: float, check: bool) -> None:
        """Add [tokens, in] inputs whose squares count `share` each."""
        gram = x.T @ x
        if check:
            self.check.add_(gram, alpha=share)
        else:
            self.fit.add_(gram, alpha=share)
            self.tokens += len(x)


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
    """Stored integers with their grid; a row is what `method[n][row]` says."""

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
