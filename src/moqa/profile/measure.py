"""Statistics of some distributions: a pass forward for significance, a pass back for sensitivity, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moqa.format.scheme import Scheme
from moqa.methods import Method
from moqa.methods.inputs import Inputs, Part, gather_inputs
from moqa.models.experts import projection_rows
from moqa.models.stages import Stages
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.profile.selfsample import draw
from moqa.profile.sensitivity import PROBES, LayerErrors, LayerObserver, Sensitivity, all_widths, relative_errors
from moqa.profile.significance import LayerStatistics
from moqa.progress import Report

BATCH_TOKENS = 2048


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """[windows, context] tokens in batches of about BATCH_TOKENS tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


@dataclass
class _Samples:
    """One distribution on its way: hidden states at every layer, for windows to calibrate on and windows to measure."""

    calibrate: list[list[Tensor]]
    measure: list[list[Tensor]]
    gradients: list[Tensor]
    tokens: int  # that are measured

    @classmethod
    def of(cls, tokens: Tensor, stages: Stages) -> "_Samples":
        # A method that fits samples leaves less error there than elsewhere: errors are made on every other window and
        # measured on the rest.
        first, second = (tokens[0::2], tokens[1::2]) if len(tokens) > 1 else (tokens, tokens)
        calibrate, measure = ([[stages.embed(b)] for b in batches(windows)] for windows in (first, second))
        return cls(calibrate, measure, gradients=[], tokens=second.numel())

    def all(self) -> list[list[Tensor]]:
        return [*self.calibrate, *self.measure]


def measure(
    view: ModelView,
    samples: dict[str, Tensor],
    scheme: Scheme,
    widths: Sequence[int],
    method: Method,
    seed: int,
    report: Report,
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Significance and sensitivity of a model on some distributions.

    >>> statistics, relative = measure(view, {"wiki": tokens}, Scheme(width=4), (2, 3, 4), METHODS["gptq"], 0, report)

    Args:
        view: the original model.
        samples: distribution name -> [windows, context] token ids.
        scheme: group size, symmetry and scale dtype of the quantization whose errors are measured.
        widths: candidate widths, ascending.
        method: the quantization method whose errors are measured.
        seed: of the labels that are drawn from the model's own predictions.
        report: called with what is done, how much of it, and of how much.

    Returns:
        Per distribution, tensors by name (`layer.3.channel`, ..., `sensitivity` [units, widths]), and the
        [units, widths] relative squared rounding error of the weights.
    """
    stages = Stages(view.model)
    steps, probes = 2 * stages.depth + 2, tuple(width for width in PROBES if width in widths)
    flows = {name: _Samples.of(tokens, stages) for name, tokens in samples.items()}
    results: dict[str, dict[str, Tensor]] = {name: {} for name in samples}
    for layer in range(stages.depth):
        report("activation", layer, steps)
        for name, flow in flows.items():
            statistics = _forward(view, stages, layer, flow.all())
            results[name].update({f"layer.{layer}.{key}": value for key, value in statistics.items()})
    report("labels", stages.depth, steps)
    generator = torch.Generator().manual_seed(seed)
    for flow in flows.values():
        for kept in flow.calibrate:
            kept.pop()
        flow.gradients = [_label_gradient(stages, kept.pop(), generator) for kept in flow.measure]
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in samples}
    for layer in reversed(range(stages.depth)):
        report("sensitivity", 2 * stages.depth - layer, steps)
        units = view.layer_units(layer)
        for name, flow in flows.items():
            inputs = _calibration_inputs(view, stages, layer, flow) if method.needs_data else {}
            found = _backward(view, stages, layer, flow, LayerErrors(view, units, scheme, method, inputs, probes))
            sums[name].update({unit: total / flow.tokens for unit, total in found.items()})
    report("rounding", 2 * stages.depth + 1, steps)
    relative = relative_errors(view, list(view.units.values()), scheme, widths)
    for name in samples:
        probed = torch.stack([sums[name][unit] for unit in view.units])
        results[name]["sensitivity"] = all_widths(probed, relative, probes, widths)
    return results, relative


@torch.no_grad()
def _forward(view: ModelView, stages: Stages, layer: int, inputs: list[list[Tensor]]) -> dict[str, Tensor]:
    down = [view.weight(u) for u in view.layer_units(layer) if u.role == "expert" and u.projection == "down_proj"]
    statistics = LayerStatistics(torch.stack([matrix.norm(dim=0) for matrix in down]).float()) if down else None
    with watching(view, layer, statistics):
        for kept in inputs:
            kept.append(stages.layer(layer, kept[-1]))
    return statistics.tensors() if statistics else {}


def _label_gradient(stages: Stages, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of labels drawn from the model, for the last layer's output."""
    hidden = hidden.detach().requires_grad_(True)
    logits = stages.head(hidden).float().flatten(0, 1)
    labels = draw(logits.detach(), generator)
    return torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), hidden)[0]


def _calibration_inputs(view: ModelView, stages: Stages, layer: int, flow: _Samples) -> dict[str, Inputs]:
    """Inputs of a layer's units on the windows to calibrate on, whose hidden states are then forgotten."""
    return gather_inputs(view, stages, layer, [Part(kept.pop()) for kept in flow.calibrate])


def _backward(view: ModelView, stages: Stages, layer: int, flow: _Samples, errors: LayerErrors) -> dict[str, Tensor]:
    """Run a layer again with gradients; replaces the flow's gradients by those of the layer's inputs."""
    sensitivity = Sensitivity(errors)
    path = view.experts_path(layer)
    observer = LayerObserver(sensitivity, path, projection_rows(view.module(path))) if path else None

    def linear(unit: Unit, x: Tensor, out: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        out.register_hook(lambda gradient: sensitivity.add(unit.name, flat, gradient.flatten(0, -2)))

    with watching(view, layer, observer, linear):
        for index, kept in enumerate(flow.measure):
            hidden = kept.pop().detach().requires_grad_(True)
            flow.gradients[index] = torch.autograd.grad(stages.layer(layer, hidden), hidden, flow.gradients[index])[0]
    return sensitivity.sums
