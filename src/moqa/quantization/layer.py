"""Quantize the units of one decoder layer, keep the better result of each, and let the layer run with them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics, input_space
from moqa.calibration.stacks import UnitStack, stacks
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix, find_kernels
from moqa.methods import METHODS, Method, SolveBatch
from moqa.models.experts import weights_from
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.runtime.packed import PackedExperts, packed_like


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


def quantize_units(
    view: ModelView,
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    method: Method,
    inputs: dict[str, InputStatistics],
) -> Iterator[tuple[Unit, QuantizedUnit]]:
    """Quantize the units of a layer, in stacks of equal shape where they need data.

    Args:
        view: the model; its weights are read, not changed.
        units: of one layer.
        schemes: unit name -> scheme.
        method: how.
        inputs: input space -> what was seen there, which is taken out when it is used; empty for methods that need no
            data.
    """
    for unit in units:
        if schemes[unit.name].is_unquantized:
            yield unit, QuantizedUnit({"weight": view.weight(unit).to(torch.bfloat16).contiguous()}, "none", None)
    narrow = [unit for unit in units if not schemes[unit.name].is_unquantized]
    if method.store is not None:
        for unit in narrow:
            yield unit, QuantizedUnit(method.store(view.weight(unit), schemes[unit.name]), method.name, None)
        return
    left = Counter(map(input_space, narrow))
    for stack in stacks(view, narrow, schemes, inputs):
        yield from solve(stack, schemes, method)
        for sharing in stack.entries:
            space = input_space(sharing[0])
            left[space] -= len(sharing)
            if not left[space]:
                inputs.pop(space, None)


def solve(stack: UnitStack, schemes: Mapping[str, Scheme], method: Method) -> Iterator[tuple[Unit, QuantizedUnit]]:
    """Quantize a stack, and for each of its units keep the better of the method and plain rounding."""
    widths = torch.empty(stack.weights.shape[:2], dtype=torch.int64)
    for unit, entry, rows in stack.places():
        widths[entry, rows] = schemes[unit.name].width
    job = SolveBatch(stack.weights, widths, stack.inputs, stack.scheme)
    results = {method.name: method.run(job)}
    results["rtn"] = METHODS["rtn"].run(job)
    dense = {name: result.decode() for name, result in results.items()}
    # of each row of each entry: squared errors of the results, and squared outputs, on the check samples
    found = {name: _squares(stack, result.sub_(stack.weights)) for name, result in dense.items()}
    total = _squares(stack, stack.weights)
    for unit, entry, rows in stack.places():
        errors = {name: float(squares[entry, rows].sum()) for name, squares in found.items()}
        # an expert that no sample reached gives no reason to prefer the method that fits samples
        best = min(errors, key=lambda name: (errors[name], name != "rtn"))
        whole = float(total[entry, rows].sum())
        error = errors[best] / whole if whole > 0 else None
        tensors = results[best][entry, rows].stored(schemes[unit.name].width)
        yield unit, QuantizedUnit(tensors, best, error)


def _squares(stack: UnitStack, difference: Tensor) -> Tensor:
    """[entries, rows] what a difference in the weights makes in each output, squared, for the check samples."""
    return torch.stack([seen.check.errors(one) for seen, one in zip(stack.inputs, difference, strict=True)])


@contextmanager
def quantized(
    view: ModelView, layer: int, done: Mapping[str, QuantizedUnit], schemes: Mapping[str, Scheme]
) -> Iterator[None]:
    """Let a decoder layer compute with its quantized units for a block, exactly as the checkpoint will.

    Args:
        view: the model; the layer's own weights are forgotten, if they can be read again.
        layer: index of the layer.
        done: result of every unit of the layer.
        schemes: unit name -> scheme.
    """
    kernels = find_kernels()
    experts: dict[tuple[int, str], PackedMatrix] = {}
    with ExitStack() as stack:
        stack.enter_context(view.without(layer))
        for unit in view.layer_units(layer):
            matrix = PackedMatrix(schemes[unit.name], unit.shape, done[unit.name].tensors)
            if unit.expert is not None:
                experts[unit.expert, unit.projection] = matrix
                continue
            parent, _, child = unit.module.rpartition(".")
            owner, linear = view.module(parent), view.module(unit.module)
            setattr(owner, child, packed_like(linear, matrix, kernels))
            stack.callback(setattr, owner, child, linear)
        path = view.experts_path(layer)
        if path is not None:
            module = view.module(path)
            stack.enter_context(weights_from(module, PackedExperts(module, experts, kernels)))
        yield
