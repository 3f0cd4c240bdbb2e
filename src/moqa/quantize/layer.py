"""Quantize the units of one decoder layer: gather their inputs, solve them in stacks, keep the better result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.format.grid import Grid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.models.experts import ExpertRun
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.quantize.methods import METHODS, Inputs, Job, Method, Result

# weights of one stack; larger stacks gain no speed and cost memory
_STACK_WEIGHTS = 2**23


@dataclass(frozen=True)
class Quantized:
    """One unit as it will be stored.

    Attributes:
        tensors: by suffix, see `Scheme.tensors`.
        dense: [out, in] weights as they will be read back, float32.
        method: the method whose result this is.
        error: squared output error over squared output on the check samples; None without data.
    """

    tensors: dict[str, Tensor]
    dense: Tensor
    method: str
    error: float | None


class InputsObserver:
    """Collects the inputs of a layer's experts, each counted by the gate weight that its output gets."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.inputs: dict[str, Inputs] = {}
        self.share, self.check = 1.0, False

    def add(self, name: str, x: Tensor) -> None:
        """Add [tokens, in] inputs of an input space."""
        self.inputs.setdefault(name, Inputs.zeros(x.shape[1])).add(x, self.share, self.check)

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Routing shows in the inputs."""

    def expert(self, run: ExpertRun) -> None:
        """Add one expert's two input spaces."""
        self.add(f"{self._path}.{run.expert}.in", run.x * run.gate)
        self.add(f"{self._path}.{run.expert}.inner", run.inner * run.gate)


def input_space(unit: Unit) -> str:
    """Name of what a unit is multiplied with; units of one module share their input."""
    if unit.expert is not None:
        return f"{unit.module}.{unit.expert}.{'inner' if unit.projection == 'down_proj' else 'in'}"
    return unit.name


def quantize_units(
    view: ModelView, units: Sequence[Unit], schemes: Mapping[str, Scheme], method: Method, inputs: Mapping[str, Inputs]
) -> Iterator[tuple[Unit, Quantized]]:
    """Quantize the units of a layer in stacks of equal shape.

    Args:
        view: the model; its weights are read, not changed.
        units: of one layer.
        schemes: unit name -> scheme.
        method: how.
        inputs: input space -> what was seen there; empty for methods that need no data.
    """
    stacks: dict[tuple, list[list[Unit]]] = {}
    spaces: dict[tuple, list[Unit]] = {}
    for unit in units:
        scheme = schemes[unit.name]
        if scheme.keeps:
            weight = view.weight(unit)
            stored = weight.to(torch.bfloat16)
            yield unit, Quantized({"weight": stored}, stored.float(), "none", None)
        else:
            spaces.setdefault((input_space(unit), scheme.model_copy(update={"width": 8})), []).append(unit)
    for (_, scheme), sharing in spaces.items():
        stacks.setdefault((scheme, tuple(unit.shape for unit in sharing)), []).append(sharing)
    for (scheme, shapes), entries in stacks.items():
        size = max(1, _STACK_WEIGHTS // sum(out * features for out, features in shapes))
        for start in range(0, len(entries), size):
            yield from _solve(view, entries[start : start + size], schemes, scheme, method, inputs)


def _solve(
    view: ModelView,
    entries: list[list[Unit]],
    schemes: Mapping[str, Scheme],
    scheme: Scheme,
    method: Method,
    inputs: Mapping[str, Inputs],
) -> Iterator[tuple[Unit, Quantized]]:
    weights = torch.stack([torch.cat([view.weight(unit).float() for unit in units]) for units in entries])
    widths = torch.tensor([[schemes[u.name].width for u in units for _ in range(u.shape[0])] for units in entries])
    seen = [inputs.get(input_space(units[0]), Inputs.zeros(weights.shape[2])) for units in entries]
    job = Job(weights, widths, seen if method.needs_data else [], scheme)
    results = {method.name: method.run(job)}
    if method.needs_data and method.name != "rtn":
        results["rtn"] = METHODS["rtn"].run(job)
    dense = {name: result.decode() for name, result in results.items()}
    for entry, units in enumerate(entries):
        row = 0
        for unit in units:
            rows = slice(row, row + unit.shape[0])
            row += unit.shape[0]
            errors = {
                n: output_error(d[entry, rows] - weights[entry, rows], seen[entry].check) for n, d in dense.items()
            }
            # an expert that no sample reached gives no reason to prefer the method that fits samples
            best = min(errors, key=lambda name: (errors[name], name != "rtn"))
            total = output_error(weights[entry, rows], seen[entry].check)
            error = errors[best] / total if method.needs_data and total > 0 else None
            width = schemes[unit.name].width
            yield unit, Quantized(_stored(results[best], entry, rows, width), dense[best][entry, rows], best, error)


def output_error(error: Tensor, gram: Tensor) -> float:
    """Squared norm of what a weight error [out, in] adds to the output, for inputs with a Gram matrix [in, in]."""
    return float(((error @ gram) * error).sum())


def _stored(result: Result, entry: int, rows: slice, width: int) -> dict[str, Tensor]:
    grid: Grid = result.grid
    tensors = {f"p{i}": plane for i, plane in enumerate(pack(result.integers[entry, rows], width))}
    tensors["scale"] = grid.scale[entry, rows]
    if grid.zero is not None:
        tensors["zero"] = grid.zero[entry, rows]
    return tensors
