"""Mode `swap`: units that the samples do not need give bits to channels that they need."""

import torch

from moqa.adjustment.choose import Choice, Scores, allocate, describe
from moqa.adjustment.modes import RESIDUAL_WIDTHS, Change, Situation, expected_gain, fit_choice, mode, tensors_of
from moqa.errors import MoqaError
from moqa.format.adjustment import Replaced
from moqa.progress import Report

# shares of the checkpoint's bytes to try to move
MOVED_SHARES = (0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.11)
# Weight of a unit's value for the known distributions, as if their divergence were that of the samples, shared among
# units by significance. Without it, experts that only known texts use would lose all the bits that they can; with a
# large weight, fewer bytes move, and the novel text gains as much from them (docs/methods/adjust.md).
KNOWN_WEIGHT = 20.0
# One bit less makes a unit's error, and so its part of the divergence, four times as large.
ERROR_GROWTH = 4.0


@mode("swap", needs_whole=True)
def swap(situation: Situation, report: Report) -> Change:
    """Adds no bytes: the units that lose least per byte lose a bit, and channels get residuals with the freed bytes.

    The loss of a unit is its current part of the divergence, half of what its channels would gain if they were exact
    (a second-order term, as gains are twice the remaining divergence), times the growth of its error; plus an estimate
    of the same for the known distributions, of which only the significance is available. The number of bytes to move is
    the one with the largest gain of the channels minus the loss of the units.
    """
    scores = situation.rule(situation.evidence)
    losses = _losses(situation)
    best: tuple[float, Choice, dict[str, Replaced]] | None = None
    for share in MOVED_SHARES:
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
    """Unit of an expert -> what it would add to the divergence with one bit less, and the bytes that this frees."""
    losses, measured = {}, situation.evidence.measured
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
                    loss = max(gain, 0.0) / 2 + KNOWN_WEIGHT * (measured.divergence or 0.0) * shares[expert]
                    losses[name] = loss * (ERROR_GROWTH - 1), freed
    return losses


def _demoted(situation: Situation, losses: dict[str, tuple[float, int]], wanted: int) -> dict[str, Replaced]:
    """The units that lose least per byte, until the wanted number of bytes is free."""
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
    """Scores without the channels of units that lose bits: residuals correct the weights that the checkpoint holds."""
    remaining: Scores = []
    for layer, tables in enumerate(scores):
        originals = situation.open_layer(layer)
        lost = {
            projection: torch.tensor([originals.name(e, projection) in units for e in range(len(table))])
            for projection, table in tables.items()
        }
        remaining.append({p: table.masked_fill(lost[p][:, None], -torch.inf) for p, table in tables.items()})
    return remaining
