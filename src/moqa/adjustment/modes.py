"""Modes: what an adjustment uses its bytes for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqa.adjustment.cached import LayerOriginals
from moqa.adjustment.choose import REMAINING_ERROR, Choice, Evidence, Scores, allocate, describe
from moqa.adjustment.measure import in_half
from moqa.adjustment.residuals import FittedChannels, Grams, fit_layer, fit_unit
from moqa.format.adjustment import ChannelPart, ExpertSizes, Replaced, index_dtype
from moqa.format.reader import Checkpoint
from moqa.format.tiles import KEEP_WIDTH
from moqa.models.experts import observed
from moqa.progress import Report
from moqa.registry import Registry
from moqa.runtime.packed import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESIDUAL_WIDTHS = (1, 2, 3)


@dataclass(frozen=True)
class Situation:
    """Everything that a mode bases its decision on.

    Attributes:
        packed: the checkpoint.
        model: loaded from it, with the reference kernels.
        open_layer: opens a layer with its cache.
        evidence: measurements on the samples.
        rule: ranks channels.
        sizes: of the layers of experts.
        limit: bytes that may be added.
    """

    packed: Checkpoint
    model: "PreTrainedModel"
    open_layer: Callable[[int], LayerOriginals]
    evidence: Evidence
    rule: Callable[[Evidence], Scores]
    sizes: ExpertSizes
    limit: int


@dataclass(frozen=True)
class Change:
    """The decision of a mode.

    Attributes:
        channels: parts with bits of their own.
        tensors: of the adjustment's weight file, by name.
        expected: expected decrease of the KL divergence on the samples, nats per token.
        units: units that replace the checkpoint's.
    """

    channels: tuple[ChannelPart, ...]
    tensors: dict[str, Tensor]
    expected: float
    units: dict[str, Replaced] = field(default_factory=dict)


@dataclass(frozen=True)
class Mode:
    """One mode.

    Attributes:
        name: as users type it.
        run: the function.
        needs_whole: whether it needs a cache of the whole original.
    """

    name: str
    run: Callable[[Situation, Report], Change]
    needs_whole: bool = False


MODES: Registry[Mode] = Registry("--mode", {
    "residual": __name__, "fp16": __name__, "requant": "moqa.adjustment.requant", "swap": "moqa.adjustment.swap",
})  # fmt: skip
mode = MODES.decorator(Mode)


@mode("residual")
def residual(situation: Situation, report: Report) -> Change:
    """A few bits on top of the packed ones, for as many channels as fit."""
    return add_bits(situation, RESIDUAL_WIDTHS, situation.limit, report)


@mode("fp16")
def fp16(situation: Situation, report: Report) -> Change:
    """Quantization errors in 16 bits: MoQa's channels that compute in half precision (v2)."""
    return add_bits(situation, (KEEP_WIDTH,), situation.limit, report)


def add_bits(situation: Situation, widths: tuple[int, ...], limit: int, report: Report) -> Change:
    """Residuals of these widths for the channels that a rule ranks first."""
    choice = allocate(situation.rule(situation.evidence), situation.sizes, widths, limit)
    fitted = fit_choice(situation, choice, {}, report)[0]
    channels = describe(choice, replaces=False)
    return Change(channels, tensors_of(channels, fitted, situation.sizes), expected_gain(situation, choice))


def fit_choice(
    situation: Situation, choice: Choice, units: dict[str, Replaced], report: Report
) -> tuple[list[list[FittedChannels]], dict[str, dict[str, Tensor]]]:
    """By layer, the residuals of the chosen channels; and by name and suffix, units in other schemes."""
    stages, hidden = situation.evidence.measured.stages, situation.evidence.measured.hidden
    residuals: list[list[FittedChannels]] = []
    solved: dict[str, dict[str, Tensor]] = {}
    for layer, wanted in enumerate(choice):
        report("fit", layer, len(choice))
        originals = situation.open_layer(layer)
        mine = {name: unit for name, unit in units.items() if name in originals.matrices}
        experts = {
            int(expert) for by_width in wanted.values() for p in by_width.values() for expert in p[:, 0].unique()
        }
        experts |= {int(name.rsplit(".", 2)[1]) for name in mine}
        if not experts or originals.module is None:
            residuals.append([])
            continue
        grams = Grams(experts)
        module = situation.model.get_submodule(originals.module)
        with torch.no_grad(), in_half(), unpacked(stages.blocks[layer]), observed(module, grams):
            for number in range(len(hidden)):
                stages.run_block(layer, hidden.at(layer, number))
        residuals.append(fit_layer(wanted, originals.missing(), grams))
        solved |= {name: fit_unit(originals.original(name), name, unit.scheme, grams) for name, unit in mine.items()}
    return residuals, solved


def tensors_of(
    channels: tuple[ChannelPart, ...], fitted: list[list[FittedChannels]], sizes: ExpertSizes
) -> dict[str, Tensor]:
    """Tensors of the weight file: part by part, and layer by layer within a part."""
    experts, places, factors, stored = [], [], [], []
    for part in channels:
        for layer in fitted:
            mine = [f for f in layer if (f.projection, f.width) == (part.projection, part.scheme.width)]
            counts = torch.zeros(sizes.experts, dtype=torch.int64)
            for one in mine:
                counts += one.places[:, 0].bincount(minlength=sizes.experts)
                places.append(one.places[:, 1])
                factors += [] if one.factor is None else [one.factor]
                stored += [one.tensors[suffix].contiguous().view(torch.uint8).flatten() for suffix in
                           part.stored(len(one.places), sizes)]  # fmt: skip
            experts.append(counts)
    shape = (len(channels), len(fitted), sizes.experts)
    return {
        "matrices": torch.cat(stored),
        "experts": torch.stack(experts).view(shape).to(torch.int16),
        "channel": torch.cat(places).to(index_dtype(sizes)),
        "factor": torch.cat(factors) if factors else torch.zeros(0, dtype=torch.bfloat16),
    }


def expected_gain(situation: Situation, choice: Choice) -> float:
    """First-order decrease of the divergence, as if the gains of channels were independent."""
    total = 0.0
    for gains, wanted in zip(situation.evidence.measured.gains, choice, strict=True):
        for projection, by_width in wanted.items():
            for width, places in by_width.items():
                gain = gains[projection][places[:, 0], places[:, 1]].sum()
                total += float(gain) * (1 - REMAINING_ERROR[width])
    return total
