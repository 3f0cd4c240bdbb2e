"""One distribution's statistics: a pass forward for significance, a pass back for sensitivity, layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moqa.format.scheme import Scheme
from moqa.models.experts import projection_rows
from moqa.models.stages import Stages
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.profile.sensitivity import LayerObserver, Rounding, Sensitivity
from moqa.profile.significance import LayerStatistics
from moqa.progress import Report

BATCH_TOKENS = 2048


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """[windows, context] tokens in batches of about BATCH_TOKENS tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


def measure(
    view: ModelView,
    samples: dict[str, Tensor],
    scheme: Scheme,
    widths: Sequence[int],
    seed: int,
    report: Report,
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Significance and sensitivity of a model on some distributions.

    >>> statistics, relative = measure(view, {"wiki": tokens}, Scheme(width=4), (2, 3, 4), 0, report)

    Args:
        view: the original model.
        samples: distribution name -> [windows, context] token ids.
        scheme: the rounding whose errors are measured.
        widths: candidate widths.
        seed: of the labels that are drawn from the model's own predictions.
        report: called with what is done, how much of it, and of how much.

    Returns:
        Per distribution, tensors by name (`layer.3.channel`, ..., `sensitivity` [units, widths]), and the
        [units, widths] relative squared rounding error of the weights.
    """
    stages = Stages(view.model)
    steps = 2 * stages.depth + 2
    cut = {name: batches(tokens) for name, tokens in samples.items()}
    inputs = {name: [[stages.embed(batch)] for batch in parts] for name, parts in cut.items()}
    results: dict[str, dict[str, Tensor]] = {name: {} for name in samples}
    for layer in range(stages.depth):
        report("activation", layer, steps)
        for name in samples:
            statistics = _forward(view, stages, layer, inputs[name])
            results[name].update({f"layer.{layer}.{key}": value for key, value in statistics.items()})
    report("labels", stages.depth, steps)
    generator = torch.Generator().manual_seed(seed)
    gradients = {name: [_label_gradient(stages, kept.pop(), generator) for kept in inputs[name]] for name in samples}
    relative: dict[str, Tensor] = {}
    sensitivity: dict[str, dict[str, Tensor]] = {name: {} for name in samples}
    for layer in reversed(range(stages.depth)):
        report("sensitivity", 2 * stages.depth - layer, steps)
        rounding = Rounding(view, view.layer_units(layer), scheme, widths)
        relative.update(rounding.relative)
        for name, tokens in samples.items():
            sums = _backward(view, stages, layer, inputs[name], gradients[name], rounding)
            sensitivity[name].update({unit: total / tokens.numel() for unit, total in sums.items()})
    for name in samples:
        results[name]["sensitivity"] = torch.stack([sensitivity[name][unit] for unit in view.units])
    return results, torch.stack([relative[unit] for unit in view.units])


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
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), hidden)[0]


def _backward(
    view: ModelView,
    stages: Stages,
    layer: int,
    inputs: list[list[Tensor]],
    gradients: list[Tensor],
    rounding: Rounding,
) -> dict[str, Tensor]:
    """Run a layer again with gradients; replaces `gradients` by those of the layer's inputs."""
    sensitivity = Sensitivity(rounding)
    path = view.experts_path(layer)
    observer = LayerObserver(sensitivity, path, projection_rows(view.module(path))) if path else None

    def linear(unit: Unit, x: Tensor, out: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        out.register_hook(lambda gradient: sensitivity.add(unit.name, flat, gradient.flatten(0, -2)))

    with watching(view, layer, observer, linear):
        for index, kept in enumerate(inputs):
            hidden = kept.pop().requires_grad_(True)
            gradients[index] = torch.autograd.grad(stages.layer(layer, hidden), hidden, gradients[index])[0]
    return sensitivity.sums
