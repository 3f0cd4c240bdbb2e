"""Residuals: quantization errors of the chosen channels, rounded for small errors in the samples' outputs."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.adjustment.cached import ExpertErrors
from moqa.adjustment.choose import scheme_of
from moqa.calibration.inputs import InputStatistics
from moqa.format.adjustment import COLUMNS, MIDDLE, ROWS
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH
from moqa.methods import METHODS, SolveBatch
from moqa.models.experts import ExpertRun

# share of the mean energy added to the energy of columns that compensate for the errors of others
DAMPING = 0.1


@dataclass(frozen=True)
class FittedChannels:
    """Channels of one projection and width of a layer, as they are stored.

    Attributes:
        projection: name of the projection.
        width: bits.
        places: [channels, 2] int64 (expert, channel), ascending.
        tensors: of the matrix, by suffix.
        factor: [channels] bfloat16, of columns only.
    """

    projection: str
    width: int
    places: Tensor
    tensors: dict[str, Tensor]
    factor: Tensor | None = None


class Grams:
    """Observer of the inputs of a layer's experts, each weighted by its gate weight."""

    def __init__(self, experts: Collection[int]) -> None:
        self._wanted = set(experts)
        self.inputs: dict[int, InputStatistics] = {}
        self.inner: dict[int, InputStatistics] = {}

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """Nothing to do: the runs include the routing."""

    def expert(self, run: ExpertRun) -> None:
        """Add one expert's tokens."""
        if run.expert not in self._wanted:
            return
        with torch.autocast("cpu", enabled=False):
            for seen, x in ((self.inputs, run.x), (self.inner, run.inner)):
                seen.setdefault(run.expert, InputStatistics(x.shape[1])).add((x * run.gate).float(), 1.0, check=False)


def fit_layer(
    choice: dict[str, dict[int, Tensor]], missing: dict[int, ExpertErrors], grams: Grams
) -> list[FittedChannels]:
    """Residuals of a layer's chosen channels.

    Rows are rounded by gptq on the samples' inputs: the errors of the packed weights were shaped so that they cancel
    there, and plain rounding of these errors would undo that. Columns also compensate for the errors of columns that
    are not chosen, by least squares on the samples' activations, the widest last.

    Args:
        choice: projection -> width -> [channels, 2] (expert, channel).
        missing: expert -> quantization errors of its channels.
        grams: statistics of the samples' inputs to the layer's experts.
    """
    return [*_fit_rows({p: choice.get(p, {}) for p in ROWS}, missing, grams),
            *_fit_columns(choice.get(COLUMNS, {}), missing, grams)]  # fmt: skip


def fit_unit(weight: Tensor, name: str, scheme: Scheme, grams: Grams) -> dict[str, Tensor]:
    """A whole unit in another scheme, by suffix: gptq on the samples' inputs, if any reach it."""
    _, expert, projection = name.rsplit(".", 2)
    seen = (grams.inner if projection == COLUMNS else grams.inputs).get(int(expert))
    widths = torch.full((1, len(weight)), scheme.width)
    result = METHODS["gptq"].run(
        SolveBatch(weight[None], widths, [seen or InputStatistics(weight.shape[1])], scheme, weight.shape[:1])
    )
    return result[0].stored(scheme.width)


def _fit_rows(
    choice: dict[str, dict[int, Tensor]], missing: dict[int, ExpertErrors], grams: Grams
) -> list[FittedChannels]:
    wanted = [(p, w, places) for p, by_width in choice.items() for w, places in by_width.items()]
    errors = {(p, w): lacking(missing, places, p) for p, w, places in wanted}
    narrow = [(p, w, places) for p, w, places in wanted if w != KEEP_WIDTH]
    fitted = [
        FittedChannels(p, w, places, {"weight": errors[p, w].bfloat16()}) for p, w, places in wanted if w == KEEP_WIDTH
    ]
    if not narrow:
        return fitted
    # all rows of an expert share its inputs: one entry of a batch of gptq problems
    everything = torch.cat([errors[p, w] for p, w, _ in narrow])
    expert = torch.cat([places[:, 0] for _, _, places in narrow])
    width = torch.cat([torch.full((len(places),), w) for _, w, places in narrow])
    experts, entry, counts = expert.unique(return_inverse=True, return_counts=True)
    order = entry.argsort(stable=True)
    slot = torch.empty_like(entry)
    slot[order] = torch.arange(len(entry)) - (counts.cumsum(0) - counts)[entry[order]]
    weights = torch.zeros(len(experts), int(counts.max()), everything.shape[1])
    widths = torch.full(weights.shape[:2], int(width.max()))
    weights[entry, slot], widths[entry, slot] = everything, width
    inputs = [grams.inputs.get(e) or InputStatistics(everything.shape[1]) for e in experts.tolist()]
    result = METHODS["gptq"].run(SolveBatch(weights, widths, inputs, scheme_of(ROWS[0], 8), weights.shape[1:2]))
    solved, begin = result[entry, slot], 0
    for p, w, places in narrow:
        rows = slice(begin, begin + len(places))
        fitted.append(FittedChannels(p, w, places, solved[rows].stored(w)))
        begin += len(places)
    return fitted


def _fit_columns(by_width: dict[int, Tensor], missing: dict[int, ExpertErrors], grams: Grams) -> list[FittedChannels]:
    # expert -> [channels, hidden] remaining errors, which shrink from width to width
    remaining = {expert: errors.missing[COLUMNS].clone() for expert, errors in missing.items()}
    fitted = []
    for width in sorted(by_width):
        places, wanted = by_width[width], []
        later = torch.cat([by_width[w] for w in sorted(by_width) if w >= width])
        for expert in places[:, 0].unique().tolist():
            channels = missing[expert].channels
            at, after = (torch.searchsorted(channels, p[p[:, 0] == expert, 1].sort().values) for p in (places, later))
            wanted.append(_compensating(remaining[expert], at, after, channels, grams.inner.get(expert)))
        target = torch.cat(wanted)
        if width == KEEP_WIDTH:
            factor, stored = torch.ones(len(target), dtype=torch.bfloat16), target.bfloat16().float()
            tensors = {"weight": target.bfloat16().T.contiguous()}
        else:
            factor, integers = round_columns(target, width)
            stored = factor.float()[:, None] * (integers - MIDDLE * (2**width - 1) / 255)
            tensors = pack_columns(integers, width)
        fitted.append(FittedChannels(COLUMNS, width, places, tensors, factor))
        for expert in places[:, 0].unique().tolist():
            mine = places[:, 0] == expert
            remaining[expert][torch.searchsorted(missing[expert].channels, places[mine, 1])] -= stored[mine]
    return fitted


def _compensating(
    missing: Tensor, at: Tensor, after: Tensor, channels: Tensor, inner: InputStatistics | None
) -> Tensor:
    """[at, hidden] what columns should add: their own errors, and compensation for those of columns not chosen.

    Args:
        missing: [channels, hidden] errors of every cached column.
        at: positions of the columns that are fitted now.
        after: positions of these and of those that will be fitted after them, ascending.
        channels: [channels] indices of the cached channels.
        inner: statistics of the samples' activations.
    """
    if inner is None:
        return missing[at]
    gram = inner.fit[channels][:, channels]
    rest = torch.ones(len(channels), dtype=torch.bool)
    rest[after] = False
    damped = gram[after][:, after].clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean() * max(1.0, len(gram) / inner.tokens) + 1e-12)
    taken = torch.linalg.solve(damped, gram[after][:, rest] @ missing[rest])
    return missing[at] + taken[torch.searchsorted(after, at)]


def lacking(missing: dict[int, ExpertErrors], places: Tensor, projection: str) -> Tensor:
    """[channels, hidden] quantization errors of rows or columns, in their order."""
    parts = []
    for expert in places[:, 0].unique().tolist():
        errors = missing[expert]
        at = torch.searchsorted(errors.channels, places[places[:, 0] == expert, 1])
        parts.append(errors.missing[projection][at])
    return torch.cat(parts)


def round_columns(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns on a grid around zero, each with the step that has the smallest squared error.

    >>> factor, integers = round_columns(torch.randn(5, 256), 2)
    >>> factor.shape, bool(integers.max() <= 3)
    (torch.Size([5]), True)

    Args:
        columns: [channels, hidden] float32.
        width: bits.

    Returns:
        [channels] bfloat16 steps and [channels, hidden] uint8 integers; zero is at MIDDLE / 255 of the grid.
    """
    top = 2**width - 1
    zero, widest = MIDDLE * top / 255, columns.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for clip in torch.linspace(0.15, 1.0, 18).tolist():
        integers = (columns / (2 * widest * clip / top) + zero).round().clamp(0, top)
        # the best step for these integers
        levels = integers - zero
        step = (columns * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        error = (columns - step * levels).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    factor = best[:, 0].bfloat16()
    return factor, (columns / factor.float()[:, None] + zero).round().clamp(0, top).to(torch.uint8)


def pack_columns(integers: Tensor, width: int) -> dict[str, Tensor]:
    """[channels, hidden] integers of columns, packed as they are stored, by suffix."""
    return {f"p{index}": plane for index, plane in enumerate(pack(integers.T.contiguous(), width))}
