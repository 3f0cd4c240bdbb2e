"""Mode `swap`: units that the samples do not need give bits to channels that they do."""

import torch

from moqa.adjustment.choose import Choice, Scores, allocate, describe
from moqa.adjustment.modes import RESIDUAL_WIDTHS, Change, Situation, expected_gain, fit_choice, mode, tensors_of
from moqa.errors import MoqaError
from moqa.format.adjustment import Replaced
from moqa.progress import Report

# shares of the checkpoint's bytes that are tried to be moved
MOVED = (0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.11)
# What a unit does for the known distributions counts so much, as if they were as far from the original as the samples
# are and shared by significance. Without it, experts that only known texts visit would lose all they can; with much of
# it, the few bytes that then move bring the novel text as much (docs/methods/adjust.md).
CARE = 20.0
# A bit less makes a unit's error four times as large; a unit's part in the divergence grows with it.
WORSE = 4.0


@mode("swap", needs_whole=True)
def swap(situation: Situation, report: Report) -> Change:
    """No byte more than before: the units that lose least per byte lose a bit, and channels get residuals for it.

    What a unit loses is its present part in the divergence, half of what its channels would gain if they were exact
    (a second-order term, as gains are twice what is left), times the growth of its error; and a share of the same for
    the known distributions, of which only the significance is at hand. How many bytes move is chosen by what the
    channels gain less what the units lose.
    """
    scores = situation.rule(situation.evidence)
    losses = _losses(situation)
    best: tuple[float, Choice, dict[str, Replaced]] | None = None
    for share in MOVED:
        units = _demoted(situation, losses, int(share * situation.packed.bytes))
        before = sum(situation.packed.manifest.units[name].scheme.stored_bytes(u.shape) for name, u in units.items())
        try:
            left = _without(scores, situation, units)
            choice = allocate(left, situation.sizes, RESIDUAL_WIDTHS, before, units)
        except MoqaError:
            continue
        worth = expected_gain(situation, choice) - sum(losses[name][0] for name in units)
        if best is None or worth > best[0]:
            best = worth, choice, units
    if best is None or best[0] <= 0:
        raise MoqaError("no swap of bits would help these samples", "choose --mode residual, which adds bytes")
    expected, choice, units = best
    fitted, solved = fit_choice(situation, choice, units, report)
    channels = describe(choice, replaces=False)
    tensors = tensors_of(channels, fitted, situation.sizes)
    tensors |= {f"{name}.{suffix}": tensor for name, unit in solved.items() for suffix, tensor in unit.items()}
    return Change(channels, tensors, expected, units)


def _losses(situation: Situation) -> dict[str, tuple[float, int]]:
    """Unit of an expert -> what it would add to the divergence with a bit less, and the bytes that this frees."""
    found, measured = {}, situation.evidence.measured
    layers = sum(bool(gains) for gains in measured.gains)
    for layer, gains in enumerate(measured.gains):
        originals, known = situation.open_layer(layer), situation.evidence.known[layer]
        shares = [] if known is None else (known.sum(1) / known.sum() / layers / len(gains)).tolist()
        for projection, table in gains.items():
            for expert, gain in enumerate(table.sum(1).tolist()):
                name = originals.name(expert, projection)
                unit = situation.packed.manifest.units[name]
                if 1 < unit.scheme.width <= 8 and not (unit.scheme.symmetric and unit.scheme.width == 2):
                    narrower = unit.scheme.model_copy(update={"width": unit.scheme.width - 1})
                    freed = unit.scheme.stored_bytes(unit.shape) - narrower.stored_bytes(unit.shape)
                    loss = max(gain, 0.0) / 2 + CARE * (measured.divergence or 0.0) * shares[expert]
                    found[name] = loss * (WORSE - 1), freed
    return found


def _demoted(situation: Situation, losses: dict[str, tuple[float, int]], wanted: int) -> dict[str, Replaced]:
    """The units that lose least per byte, until so many bytes are free."""
    units: dict[str, Replaced] = {}
    freed = 0
    for name in sorted(losses, key=lambda name: (losses[name][0] / losses[name][1], name)):
        if freed >= wanted:
            break
        unit = situation.packed.manifest.units[name]
        scheme = unit.scheme.model_copy(update={"width": unit.scheme.width - 1})
        units[name] = Replaced(shape=unit.shape, scheme=scheme)
        freed += losses[name][1]
    return units


def _without(scores: Scores, situation: Situation, units: dict[str, Replaced]) -> Scores:
    """Scores without the channels of units that lose bits: residuals are made for what the checkpoint holds."""
    found: Scores = []
    for layer, tables in enumerate(scores):
        originals = situation.open_layer(layer)
        lost = {
            projection: torch.tensor([originals.name(e, projection) in units for e in range(len(table))])
            for projection, table in tables.items()
        }
        found.append({p: table.masked_fill(lost[p][:, None], -torch.inf) for p, table in tables.items()})
    return found
