"""Mode `requant`: MoQa's runtime switching (v3); channels of experts whose class changed take the class's width."""

import numpy as np
import torch
from torch import Tensor

from moqa.adjustment.choose import Choice, describe, row_bytes, scheme_of
from moqa.adjustment.modes import Change, Situation, mode, tensors_of
from moqa.adjustment.residuals import FittedChannels, lacking, pack_columns, round_columns
from moqa.errors import MoqaError
from moqa.format.adjustment import COLUMNS, layout
from moqa.methods import GridResult
from moqa.methods.grid import fit_grid
from moqa.models.experts import PROJECTIONS
from moqa.planning.clustering import fuzzy_c_means
from moqa.planning.strategies.paper import CLASSES, low_precision_first
from moqa.progress import Report


@mode("requant")
def requant(situation: Situation, report: Report) -> Change:
    """Experts are classified by their significance on the samples, as for the known distributions; cached channels of
    experts whose class changed replace the packed ones, with the width of the new class.

    MoQa (arXiv 2503.21135), section on distribution-aware switching. The paper does not say which of the cached
    channels to take; here the rule decides (`--rule dynamics` is the paper's), until the bytes are used.
    """
    novel = [None if s is None else s.sum(1) for s in situation.evidence.measured.significance]
    known = [None if s is None else s.sum(1) for s in situation.evidence.known]
    before, now = classes(known), classes(novel)
    changed = [None if a is None or b is None else a != b for a, b in zip(before, now, strict=True)]
    if not any(bool(c.any()) for c in changed if c is not None):
        raise MoqaError("no expert's class changes on these samples", "choose another --mode")
    scores = [
        {} if moved is None else {p: t.masked_fill(~moved[:, None], -torch.inf) for p, t in tables.items()}
        for moved, tables in zip(changed, situation.rule(situation.evidence), strict=True)
    ]
    choice = _fitting(situation, scores, now)
    fitted = [_round_layer(situation, layer, wanted, report) for layer, wanted in enumerate(choice)]
    channels = describe(choice, replaces=True)
    return Change(channels, tensors_of(channels, fitted, situation.sizes), 0.0)


def classes(significance: list[Tensor | None]) -> list[Tensor | None]:
    """By layer, [experts] index of each expert's class among 2, 4, 6 and 8 bits; all layers are clustered together."""
    shares = [None if s is None else (s / s.sum().clamp_min(1e-30)).double() for s in significance]
    everything = torch.cat([share for share in shares if share is not None])
    _, membership = fuzzy_c_means(everything.numpy(), len(CLASSES))
    indices, begin = low_precision_first(membership), 0
    layers: list[Tensor | None] = []
    for share in shares:
        count = 0 if share is None else len(share)
        layers.append(None if share is None else torch.from_numpy(np.asarray(indices[begin : begin + count])))
        begin += count
    return layers


def _fitting(situation: Situation, scores: list[dict[str, Tensor]], now: list[Tensor | None]) -> Choice:
    """As many of the best channels as fit."""
    sizes, flat = situation.sizes, [table.flatten() for layer in scores for table in layer.values()]
    ranked = torch.cat(flat).sort(descending=True).values
    ranked = ranked[ranked > -torch.inf]
    low, high, best = 0, len(ranked), None
    high = min(high, int(situation.limit / min(row_bytes(p, CLASSES[0], sizes) for p in PROJECTIONS)))
    while low < high:
        middle = (low + high + 1) // 2
        choice = _above(scores, float(ranked[middle - 1]), now)
        if layout(sizes, describe(choice, replaces=True), {}).bytes <= situation.limit:
            low, best = middle, choice
        else:
            high = middle - 1
    if best is None:
        raise MoqaError(f"{situation.limit} bytes are too few for a channel of this model", "give more --bytes")
    return best


def _above(scores: list[dict[str, Tensor]], limit: float, now: list[Tensor | None]) -> Choice:
    choice: Choice = []
    for tables, level in zip(scores, now, strict=True):
        chosen: dict[str, dict[int, Tensor]] = {}
        for projection, table in tables.items():
            places = (table >= limit).nonzero()
            assert level is not None
            widths = torch.tensor(CLASSES)[level[places[:, 0]]]
            by_width = {w: places[widths == w] for w in CLASSES if bool((widths == w).any())}
            chosen[projection] = by_width
        choice.append(chosen)
    return choice


def _round_layer(
    situation: Situation, layer: int, wanted: dict[str, dict[int, Tensor]], report: Report
) -> list[FittedChannels]:
    report("fit", layer, len(situation.evidence.known))
    originals = situation.open_layer(layer)
    missing, fitted = originals.missing(), []
    for projection, by_width in wanted.items():
        for width, places in by_width.items():
            rows = originals.packed_rows(projection, places) + lacking(missing, places, projection)
            if projection == COLUMNS:
                factor, integers = round_columns(rows, width)
                fitted.append(FittedChannels(projection, width, places, pack_columns(integers, width), factor))
                continue
            rounded = fit_grid(rows, scheme_of(projection, width))
            tensors = GridResult(rounded.integers, rounded.grid).stored(width)
            fitted.append(FittedChannels(projection, width, places, tensors))
    return fitted
