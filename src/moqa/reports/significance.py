"""Section on significance: the contribution of experts on each distribution, and how it drifts."""

import math

import numpy as np
from numpy.typing import NDArray

from moqa.profiling.record import SELF
from moqa.profiling.store import Profile
from moqa.reports import drift
from moqa.reports.blocks import (
    CellGrid,
    Chart,
    Key,
    KeyEntry,
    Note,
    PageElement,
    Picker,
    Scale,
    Section,
    Table,
    number,
    percent,
)  # fmt: skip
from moqa.reports.charts import Axis, dash, heat_map, line, line_chart, linear, map_height, stacked, upper
from moqa.reports.palette import LINES, MUTED, TEXT

_CURVE = tuple(np.geomspace(0.001, 1, 61).tolist())
_CURVES = (("drift", LINES[0]), ("significance (control)", TEXT), ("even spread", MUTED))


def significance_section(profile: Profile) -> Section | None:
    """Section with maps of significance, and the drift between every two distributions."""
    if not profile.expert_layers:
        return None
    names = drift.distributions(profile)
    tables = {name: _shares(profile, name) for name in names}
    top = upper(np.stack(list(tables.values())))
    hover = "layer {y}, expert {x}\n{z:.2f} % of the layer"
    maps = tuple(heat_map(titled(n), t, profile.expert_layers, hover, (0.0, top)) for n, t in tables.items())
    ends = ("0 %", f"{top:.1f} % or more")
    blocks: list[PageElement] = [CellGrid(maps, Scale("sequential", *ends, "share of the layer's output"))]
    reading = (
        "A cell is an expert; its colour is the share of its layer's output that the expert contributes on a "
        "distribution. Where the maps of two distributions differ, a plan fitted on one spends its bits in the wrong "
        "place for the other."
    )
    pairs = drift.pairs(profile)
    if pairs:
        limit = max(upper(np.abs(tables[b] - tables[a])) for a, b in pairs)
        blocks += [
            Note(
                "The map compares two distributions expert by expert. The curve shows whether few channels hold most "
                "of the drift. If drift were proportional to significance, the solid line would lie on the dashed one; "
                "above it, drift is more concentrated than significance.",
                "Drift between two distributions",
            ),
            Picker("Pair", tuple((f"{a} \u2192 {b}", _pair(profile, tables, a, b, limit)) for a, b in pairs)),
            _table(profile, pairs),
            Note(
                "Rank correlation 1: the same experts matter, in the same order; 0: no relation. The top 1 % are the "
                "channels of largest drift, or of largest significance for the two controls. Routing divergence "
                "(Jensen-Shannon) 0: every expert is picked equally often; 1: no expert in common."
            ),
            *_by_layer(profile, pairs),
        ]
    return Section("Significance", "What each expert carries", reading, blocks)


def titled(name: str) -> str:
    """Title of a chart for a distribution."""
    return f"{name} (the model's own text)" if name == SELF else name


def _shares(profile: Profile, name: str) -> NDArray[np.float64]:
    return stacked([profile.significance(name, layer).double().numpy() * 100 for layer in profile.expert_layers])


def _pair(profile: Profile, tables: dict[str, NDArray], a: str, b: str, limit: float) -> tuple[PageElement, ...]:
    change = tables[b] - tables[a]
    ends = (f"{limit:.1f} points less on {b}", f"{limit:.1f} points more on {b}")
    height = max(300, map_height(len(change)))
    left = heat_map(
        f"Significance: {b} minus {a}", change, profile.expert_layers, "layer {y}, expert {x}\n{z:+.2f} points",
        (-limit, limit), scale="diverging", height=height, legend=Scale("diverging", *ends),
    )  # fmt: skip
    return (CellGrid((left, _curves(profile, a, b, height))), Key(tuple(KeyEntry(*one) for one in _CURVES)))


def _curves(profile: Profile, a: str, b: str, height: int) -> Chart:
    held = (
        drift.drift_concentration(profile, a, b, _CURVE), drift.significance_concentration(profile, a, b, _CURVE),
        {share: share for share in _CURVE},
    )  # fmt: skip
    lines = [
        line([share * 100 for share in shares], [value * 100 for value in shares.values()], colour,
             [f"{name}\n{share:.2%} of the channels hold {value:.1%}" for share, value in shares.items()],
             dash=style)
        for (name, colour), shares, style in zip(_CURVES, held, ("solid", "dash", "dot"), strict=True)
    ]  # fmt: skip
    x = Axis("% of all channels, largest first", (0.1, 100), (0.1, 1, 5, 10, 50, 100), log=True)
    y = Axis("% held", (0, 102), (0, 20, 40, 60, 80, 100))
    return line_chart("How concentrated the drift is", lines, x, y, height)


def _table(profile: Profile, pairs: list[tuple[str, str]]) -> Table:
    rows = []
    for a, b in pairs:
        held, own = drift.drift_concentration(profile, a, b), drift.significance_concentration(profile, a, b)
        layers = drift.layer_rank_correlations(profile, a, b)
        routing = drift.routing_divergence(profile, a, b)
        rows.append(
            (f"{a} \u2192 {b}", number(drift.rank_correlation(profile, a, b)), number(_least(layers)),
             *(percent(share) for share in held.values()), percent(own[0.01]),
             percent(drift.drift_of_significant(profile, a, b)[0.01]), number(float(np.mean(routing)), 3),
             number(-_least([-v for v in routing]), 3))
        )  # fmt: skip
    heads = (
        "Pair", "Rank correlation of experts", "Lowest layer", "Drift in top 1 %", "in top 5 %", "in top 10 %",
        "Control: significance in its top 1 %", "Control: drift in the 1 % most significant before",
        "Routing divergence, mean", "largest",
    )  # fmt: skip
    return Table("Drift in numbers", heads, tuple(rows))


def _least(values: list[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def _by_layer(profile: Profile, pairs: list[tuple[str, str]]) -> list[PageElement]:
    """Charts of rank correlation and routing divergence per layer, one line per pair."""
    if len(profile.expert_layers) < 2:
        return []
    lines = [
        (a, b, f"{a} \u2192 {b}", LINES[index % len(LINES)], dash(index, len(LINES)))
        for index, (a, b) in enumerate(pairs)
    ]
    layers = profile.expert_layers
    charts = []
    for title, measure, least in (
        ("Rank correlation of experts, by layer", drift.layer_rank_correlations, None),
        ("Routing divergence, by layer (bits)", drift.routing_divergence, 0.0),
    ):
        values = [measure(profile, a, b) for a, b, *_ in lines]
        drawn = [
            line(layers, y, colour, [f"{name}\nlayer {n}: {value:.3f}" for n, value in zip(layers, y, strict=True)],
                 dash=style, marker="circle")
            for (_, _, name, colour, style), y in zip(lines, values, strict=True)
        ]  # fmt: skip
        y = linear("", [value for each in values for value in each], least=least)
        charts.append(line_chart(title, drawn, linear("layer", layers, whole=True), y, 280))
    return [Key(tuple(KeyEntry(name, colour) for _, _, name, colour, _ in lines)), CellGrid(tuple(charts))]
