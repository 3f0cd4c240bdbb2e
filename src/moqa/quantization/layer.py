"""Quantize the units of one layer, keep the better result of each, and run the layer with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.outputs import OutputGradients
from moqa.calibration.stacks import UnitStack
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, ProductKernels, find_kernels
from moqa.methods import METHODS, Method, SolveBatch
from moqa.models.view import ModelView
from moqa.runtime.packed import computing_with


@dataclass(frozen=True)
class QuantizedUnit:
    """One unit as it will be stored.

    Attributes:
        tensors: by suffix, see `Scheme.tensors`.
        method: the method whose result this is.
        error: squared output error over squared output on the check samples; None without data.
    """

    tensors: dict[str, Tensor]
    method: str
    error: float | None


def solve(
    stack: UnitStack, schemes: Mapping[str, Scheme], method: Method, gradients: OutputGradients | None = None,
    near: Callable[[str, tuple[int, int]], Tensor] | None = None,
) -> dict[str, QuantizedUnit]:  # fmt: skip
    """Unit name -> result of a stack: for each of its units the better of the method and plain rounding.

    Args:
        stack: the units.
        schemes: unit name -> scheme.
        method: that is tried.
        gradients: at the layer's output, if they are known.
        near: from the name and shape of a unit to the values that its weights stay next to, see `SolveBatch.near`.
    """
    solved: dict[str, QuantizedUnit] = {}
    widths = torch.empty(stack.weights.shape[:2], dtype=torch.int64)
    for unit, entry, rows in stack.places():
        widths[entry, rows] = schemes[unit.name].width
    outputs = [] if gradients is None else [
        [gradients.gram(unit, seen) for unit in units] for units, seen in zip(stack.entries, stack.inputs, strict=True)
    ]  # fmt: skip
    values = None
    if near is not None:
        values = torch.empty_like(stack.weights)
        for unit, entry, rows in stack.places():
            values[entry, rows] = near(unit.name, unit.shape)
    job = SolveBatch(stack.weights, widths, stack.inputs, stack.scheme, stack.parts, outputs, values)
    results = {method.name: method.run(job)}
    results["rtn"] = METHODS["rtn"].run(job)
    dense = {name: result.decode() for name, result in results.items()}
    # for each row of each entry, on the check samples: squared errors of the results, and squared outputs
    squared = {name: _squares(stack, result.sub_(stack.weights), outputs) for name, result in dense.items()}
    total = _squares(stack, stack.weights, outputs)
    for unit, entry, rows in stack.places():
        errors = {name: float(squares[entry, rows].sum()) for name, squares in squared.items()}
        # without samples for an expert, there is no reason to prefer the method that fits samples
        best = min(errors, key=lambda name: (errors[name], name != "rtn"))
        whole = float(total[entry, rows].sum())
        error = errors[best] / whole if whole > 0 else None
        tensors = results[best][entry, rows].stored(schemes[unit.name].width)
        solved[unit.name] = QuantizedUnit(tensors, best, error)
    return solved


def _squares(stack: UnitStack, difference: Tensor, outputs: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """[entries, rows] squared change of outputs on the check samples, for a difference in the weights."""
    found = torch.empty(difference.shape[:2])
    for unit, entry, rows in stack.places():
        gram = outputs[entry][stack.entries[entry].index(unit)] if outputs else None
        found[entry, rows] = stack.inputs[entry].check.errors(difference[entry, rows], gram)
    return found


@contextmanager
def quantized(
    view: ModelView,
    layer: int,
    done: Mapping[str, QuantizedUnit],
    schemes: Mapping[str, Scheme],
    kernels: ProductKernels | None = None,
) -> Iterator[None]:
    """Inside this context, a layer computes with its quantized units, exactly as the checkpoint will.

    Args:
        view: the model; the layer's own weights are freed if they can be read again.
        layer: index of the layer.
        done: result of every unit of the layer.
        schemes: unit name -> scheme.
        kernels: that multiply; None means the fastest.
    """
    matrices = {
        unit.name: PackedMatrix(schemes[unit.name], unit.shape, done[unit.name].tensors)
        for unit in view.block_units(layer)
    }
    with computing_with(view, layer, matrices, kernels or find_kernels()):
        yield
