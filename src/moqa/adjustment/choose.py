"""Which channels get how many bits: rules that rank channels, and the best use of a number of bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.adjustment.measure import ChannelGains
from moqa.errors import MoqaError
from moqa.format.adjustment import COLUMNS, ChannelPart, ExpertSizes, Replaced, layout
from moqa.format.scheme import Scheme
from moqa.format.tiles import BLOCK, KEEP_WIDTH, LARGEST_GROUP, TILE
from moqa.models.experts import PROJECTIONS
from moqa.registry import Registry

# number of inputs of a row that share a scale
ROW_GROUP = 256
# Share of a row's error that remains after a residual of a width: that of the best grid of so many levels for normally
# distributed errors.
REMAINING_ERROR = {1: 0.37, 2: 0.12, 3: 0.035, KEEP_WIDTH: 0.0}

# the last bytes are spent at lower prices: shares of the price at which all others are spent
LEFTOVER_PRICES = (0.97, 0.9, 0.8)

# by layer and projection, [experts, width] value of a channel
Scores = list[dict[str, Tensor]]
# by layer and projection: width -> [channels, 2] int64 (expert, channel), ascending
Choice = list[dict[str, dict[int, Tensor]]]


@dataclass(frozen=True)
class Evidence:
    """What a rule may use.

    Attributes:
        measured: gains on the samples of the novel distribution.
        known: by layer, [experts, width] significance on the known distributions; None in layers without experts.
        seed: of random choices.
    """

    measured: ChannelGains
    known: list[Tensor | None]
    seed: int


def by_gain(evidence: Evidence) -> Scores:
    """Ours: decrease of the divergence if a row or column were exact. Each has a score of its own."""
    return evidence.measured.gains


def by_dynamics(evidence: Evidence) -> Scores:
    """MoQa's: how far a channel's share of its layer's significance is from its share on the known distributions."""
    pairs = zip(evidence.measured.significance, evidence.known, evidence.measured.gains, strict=True)
    return [
        {}
        if novel is None or known is None
        else _same_for_all((novel / novel.sum() - known / known.sum()).abs(), gains)
        for novel, known, gains in pairs
    ]


def at_random(evidence: Evidence) -> Scores:
    """The control: every channel is equally likely."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return [
        _same_for_all(torch.rand(gains[COLUMNS].shape, generator=generator), gains) if gains else {}
        for gains in evidence.measured.gains
    ]


RULES: Registry[Callable[[Evidence], Scores]] = Registry("--rule")
RULES.update(gain=by_gain, dynamics=by_dynamics, random=at_random)


def allocate(
    scores: Scores, sizes: ExpertSizes, widths: tuple[int, ...], limit: int, units: Mapping[str, Replaced] | None = None
) -> Choice:
    """The channels and widths with the largest total value, within a number of bytes on disk.

    A channel gets the width whose gain is furthest above its price; the price of a byte is raised until all fit. A
    layer's channels of one width fill whole tiles, since a partly used tile takes the same space.

    Args:
        scores: see `RULES`; -inf or missing for a channel that is not available.
        sizes: of the layers.
        widths: candidates.
        limit: bytes of the adjustment's weight file.
        units: that are stored in the file too.

    Raises:
        MoqaError: if not even one tile fits.
    """

    def fits(choice: Choice) -> bool:
        return layout(sizes, describe(choice, replaces=False), units or {}).bytes <= limit

    ranked = [{p: _Ranked(score) for p, score in layer.items()} for layer in scores]
    values = [r.scores[0] for layer in ranked for r in layer.values() if len(r.scores)]
    if not values:
        raise MoqaError(
            "no channel would gain from more bits", "the samples show no loss, so there is nothing to adjust"
        )
    low, high = 0.0, float(max(values)) / min(row_bytes(p, widths[0], sizes) for p in PROJECTIONS)
    best: Choice | None = None
    for _ in range(30):
        price = (low + high) / 2
        choice = [{p: r.at(price, p, widths, sizes) for p, r in layer.items()} for layer in ranked]
        if fits(choice):
            best, high = choice, price
        else:
            low = price
    if best is None or not any(by_width for layer in best for by_width in layer.values()):
        raise MoqaError(
            f"{limit} bytes are too few for a channel of this model",
            f"give at least {smallest(sizes, widths, len(scores))}",
        )
    # whole tiles leave some bytes unused: lower the price a little for one projection of one layer at a time
    for cheaper in LEFTOVER_PRICES:
        for layer, projections in enumerate(ranked):
            for p, r in projections.items():
                more = best[layer] | {p: r.at(high * cheaper, p, widths, sizes)}
                choice = [*best[:layer], more, *best[layer + 1 :]]
                best = choice if fits(choice) else best
    return best


def describe(choice: Choice, replaces: bool) -> tuple[ChannelPart, ...]:
    """The parts of an adjustment that hold a choice."""
    parts = []
    for projection in PROJECTIONS:
        for width in sorted({w for layer in choice for w in layer.get(projection, {})}):
            counts = tuple(len(layer.get(projection, {}).get(width, ())) for layer in choice)
            scheme = scheme_of(projection, width)
            parts.append(ChannelPart(projection=projection, scheme=scheme, replaces=replaces, counts=counts))
    return tuple(parts)


def scheme_of(projection: str, width: int) -> Scheme:
    """Scheme of a projection's channels; columns have a single group, and factors of their own."""
    return Scheme(width=width, group_size=LARGEST_GROUP if projection == COLUMNS else ROW_GROUP)


def row_bytes(projection: str, width: int, sizes: ExpertSizes) -> float:
    """Bytes of one row or column, without shared ones."""
    scales = 2 if projection == COLUMNS else 3 * -(-sizes.hidden // ROW_GROUP)
    return sizes.hidden * width / 8 + (0 if width == KEEP_WIDTH else scales) + 2


def smallest(sizes: ExpertSizes, widths: tuple[int, ...], layers: int) -> int:
    """Bytes of the smallest possible adjustment."""
    counts = (TILE, *(0 for _ in range(layers - 1)))
    part = ChannelPart(projection="gate_proj", scheme=scheme_of("gate_proj", widths[0]), replaces=False, counts=counts)
    return layout(sizes, (part,), {}).bytes


class _Ranked:
    """One projection's channels of a layer, the best first."""

    def __init__(self, scores: Tensor) -> None:
        flat = scores.flatten()
        order = flat.argsort(descending=True, stable=True)
        order = order[flat[order] > 0]
        self.scores, self._width = flat[order].double(), scores.shape[1]
        self._places = torch.stack([order // self._width, order % self._width], 1)

    def at(self, price: float, projection: str, widths: tuple[int, ...], sizes: ExpertSizes) -> dict[int, Tensor]:
        """Channels by width at a price of a byte: a channel with a higher score never gets fewer bits."""
        costs = torch.tensor([price * row_bytes(projection, width, sizes) for width in widths])
        kept = torch.tensor([1 - REMAINING_ERROR[width] for width in widths], dtype=torch.float64)
        worth = self.scores[:, None] * kept - costs
        best, column = worth.max(1)
        column = torch.where(best > 0, column, -1)
        unit = BLOCK if projection == COLUMNS else TILE
        by_width, begin = {}, 0
        for index in reversed(range(len(widths))):
            wanted = int((column == index).sum())
            count = min((wanted + unit // 2) // unit * unit, len(self.scores) - begin)
            if count > 0:
                chosen = self._places[begin : begin + count]
                by_width[widths[index]] = chosen[(chosen[:, 0] * self._width + chosen[:, 1]).argsort()]
            begin += max(count, 0)
        return by_width


def _same_for_all(score: Tensor, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same score for a channel's two rows and its column, if the cache has the channel."""
    return {projection: torch.where(gain > -torch.inf, score, -torch.inf) for projection, gain in gains.items()}
