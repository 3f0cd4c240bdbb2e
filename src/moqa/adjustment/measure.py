"""How much every cached channel would gain on some samples if it were exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqa.adjustment.cached import LayerOriginals
from moqa.calibration.hidden import HiddenStates, run_back
from moqa.models.experts import PROJECTIONS, ExpertRun, observed, projection_rows
from moqa.models.layerwise import LayerwiseModel
from moqa.profiling.selfsample import draw
from moqa.progress import Report
from moqa.runtime.packed import unpacked
from moqa.storage.in_memory import InMemoryRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# One window in this many is used to measure gains; residuals are fitted on all of them. Gains need less text than
# rounding (docs/methods/adjust.md).
MEASURED_EVERY = 3
# Weight of a channel's squared effects relative to its mean effect, scaled to the same total: the mean alone is noise
# for the many channels that matter little.
SQUARES_WEIGHT = 1.5
# tokens that go through a layer together, and through the head
BATCH_TOKENS, HEAD_TOKENS = 8192, 2048
Open = Callable[[int], LayerOriginals]


@dataclass(frozen=True)
class ChannelGains:
    """Measurements on the samples.

    Attributes:
        gains: by layer and projection, [experts, width]: decrease of the KL divergence from the original if a channel's
            row or column were exact, nats per token; -inf for channels that the cache does not have.
        significance: by layer, [experts, width] (`channel` of `LayerStatistics`), on the samples.
        stages: of the checkpoint's model.
        hidden: the samples as inputs of every layer.
        divergence: current KL divergence on the samples, nats per token; None without the whole original.
    """

    gains: list[dict[str, Tensor]]
    significance: list[Tensor | None]
    stages: LayerwiseModel
    hidden: HiddenStates
    divergence: float | None


def measure(
    model: "PreTrainedModel", open_layer: Open, tokens: Tensor, whole: bool, seed: int, report: Report
) -> ChannelGains:
    """Run samples forward and backward through a checkpoint, one layer at a time.

    With the whole original, the gradient is that of the KL divergence between the original and the checkpoint, which
    includes how errors of different units add up. Without it, the gradient is that of labels drawn from the
    checkpoint's own predictions, and a channel's gain is half its squared effect (as in `moqa.profiling.sensitivity`).

    Args:
        model: of the checkpoint, with the reference kernels.
        open_layer: opens a layer with its cache.
        tokens: [windows, context] samples.
        whole: whether the cache holds the whole original.
        seed: of the labels.
        report: called per layer.
    """
    stages, size = LayerwiseModel(model), max(1, BATCH_TOKENS // tokens.shape[1])
    steps, weighed = 2 * stages.depth, tokens[::MEASURED_EVERY]
    parts = weighed.split(size)
    rest = [part for part in tokens[torch.arange(len(tokens)) % MEASURED_EVERY > 0].split(size) if len(part)]
    hidden = HiddenStates(stages, InMemoryRun(), "samples", [*parts, *rest])
    original = HiddenStates(stages, InMemoryRun(), "original", parts if whole else ())
    with torch.no_grad():
        for layer in range(stages.depth):
            report("samples", layer, steps)
            if whole:
                with open_layer(layer).as_original():
                    original.advance(layer, keep=False)
            with unpacked(stages.blocks[layer]):
                hidden.advance(layer, numbers=range(len(parts)))
                with in_half():
                    hidden.advance(layer, numbers=range(len(parts), len(hidden)))
    generator = torch.Generator().manual_seed(seed)
    divergence, gradients = 0.0, []
    for index in range(len(parts)):
        part, answer = (one.at(stages.depth, index) if one else None for one in (hidden, original))
        assert part is not None
        pieces = []
        for begin in range(0, len(part), windows := max(1, HEAD_TOKENS // tokens.shape[1])):
            some = slice(begin, begin + windows)
            pieces.append(_gradient(stages, part[some], None if answer is None else answer[some], generator))
        divergence += sum(loss for loss, _ in pieces)
        gradients.append(torch.cat([gradient for _, gradient in pieces]))
    hidden.forget(stages.depth)
    observers: list[_Observer | None] = []
    for layer in reversed(range(stages.depth)):
        report("samples", steps - 1 - layer, steps)
        weighed_parts = [hidden.at(layer, number) for number in range(len(parts))]
        observers.insert(0, _backward(stages, layer, open_layer(layer), weighed_parts, gradients))
    gains, squares = [o.gains if o else {} for o in observers], [o.squares if o else {} for o in observers]
    significance = [o.significance if o else None for o in observers]
    count = weighed.numel()
    return ChannelGains(
        _combined(gains, squares, count, whole), significance, stages, hidden, divergence / count if whole else None
    )


def _gradient(
    stages: LayerwiseModel, part: Tensor, original: Tensor | None, generator: torch.Generator
) -> tuple[float, Tensor]:
    """The loss and its gradient for the last layer's output."""
    hidden = part.detach().requires_grad_(True)
    logits = stages.head(hidden)
    with torch.no_grad():
        own = logits.float().flatten(0, 1).log_softmax(-1)
        if original is None:
            labels = draw(own, generator)[:, None]
            loss = -float(own.gather(1, labels).sum())
            slope = own.exp_().scatter_add_(1, labels, torch.full(labels.shape, -1.0))
        else:
            true = stages.head(original).float().flatten(0, 1).log_softmax(-1)
            likely = true.exp()
            loss = float(torch.linalg.vecdot(likely, true.sub_(own)).sum())
            slope = own.exp_().sub_(likely)
    return loss, torch.autograd.grad(logits, hidden, slope.view_as(logits).to(logits.dtype))[0]


def _combined(
    gains: list[dict[str, Tensor]], squares: list[dict[str, Tensor]], tokens: int, first_order: bool
) -> list[dict[str, Tensor]]:
    """Gains of channels per token, from sums of effects and half their squares."""
    if not first_order:
        return [{p: square / tokens for p, square in layer.items()} for layer in squares]
    total, energy = (
        sum(float(table.clamp_min(0).sum()) for layer in layers for table in layer.values())
        for layers in (gains, squares)
    )
    share = SQUARES_WEIGHT * max(total, 1e-30) / max(energy, 1e-30)
    return [
        {p: (gain[p].clamp_min(0) + share * square[p]) / tokens for p in gain}
        for gain, square in zip(gains, squares, strict=True)
    ]


class _Observer:
    """Collects the effects of channels' quantization errors, and their significance, in the backward pass."""

    def __init__(self, originals: LayerOriginals, rows: dict[str, slice], width: int) -> None:
        self._errors, self._rows = originals.missing(), rows
        self._norms = [originals.matrices[originals.name(e, "down_proj")].dense().norm(dim=0)
                       for e in range(originals.experts)]  # fmt: skip
        shape = (originals.experts, width)
        # -inf for channels that the cache does not have
        self.gains = {p: torch.full(shape, -torch.inf) for p in PROJECTIONS}
        for expert, errors in self._errors.items():
            for gain in self.gains.values():
                gain[expert, errors.channels] = 0.0
        self.squares = {p: gain.clone() for p, gain in self.gains.items()}
        self.significance = torch.zeros(shape)

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Nothing to do: the runs include the routing."""

    def expert(self, run: ExpertRun) -> None:
        """Wait for the gradients of one expert's two products."""
        self.significance[run.expert] += (run.inner.detach().abs() * run.gate.detach()).sum(0) * self._norms[run.expert]
        if run.expert in self._errors:
            run.on_gradients(self._rows, partial(self._add, run.expert))

    def _add(self, expert: int, projection: str, x: Tensor, gradient: Tensor) -> None:
        """Add the effects of rows or columns, from [tokens, in] inputs and [tokens, out] gradients."""
        of_channels, others = (x, gradient) if projection == "down_proj" else (gradient, x)
        errors = self._errors[expert]
        channels = slice(None) if len(errors.channels) == of_channels.shape[1] else errors.channels
        effect = of_channels[:, channels] * (others @ errors.missing[projection].T.to(others.dtype))
        self.gains[projection][expert, channels] -= effect.sum(0, dtype=torch.float32)
        self.squares[projection][expert, channels] += 0.5 * effect.square_().sum(0, dtype=torch.float32)


def _backward(
    stages: LayerwiseModel, layer: int, originals: LayerOriginals, hidden: Sequence[Tensor], gradients: list[Tensor]
) -> _Observer | None:
    """Run a layer again with gradients; replaces `gradients` with those of the layer's inputs."""
    module = None if originals.module is None else stages.model.get_submodule(originals.module)
    with unpacked(stages.blocks[layer]):
        if module is None:
            _flow(stages, layer, hidden, gradients)
            return None
        width = originals.matrices[originals.name(0, "down_proj")].shape[1]
        observer = _Observer(originals, projection_rows(module, width), width)
        with observed(module, observer):
            _flow(stages, layer, hidden, gradients)
    return observer


def _flow(stages: LayerwiseModel, layer: int, hidden: Sequence[Tensor], gradients: list[Tensor]) -> None:
    run_back(stages, layer, zip(hidden, gradients, strict=True), gradients.__setitem__, precision=in_half)


def in_half() -> torch.autocast:
    """Products in bfloat16: three times as fast, and exact enough for gradients and sums of squares."""
    return torch.autocast("cpu", torch.bfloat16)
