"""Section on bits: the width of every expert and every other unit."""

from collections.abc import Sequence

import numpy as np

from moqa.profiling.record import SELF, UnitRecord
from moqa.reports.allocation import Allocation
from moqa.reports.blocks import (
    BarPart,
    Bars,
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
)
from moqa.reports.charts import heat_map
from moqa.reports.palette import WIDTHS

# 16 means not quantized; the colour scale ends at 8 so that the widths in use can be distinguished
_LIMITS = (1.0, 8.0)


def bits_section(made: Sequence[Allocation], first: Allocation | None = None) -> Section | None:
    """Section on widths per plan: shares of the weights, then one map per plan, beginning with `first`."""
    if not made:
        return None
    used = sorted({width for one in made for width in one.widths})
    bars = Bars(
        "Share of the weights at each width",
        tuple(
            (one.label, tuple(BarPart(_bits(width), share, WIDTHS[width]) for width, share in one.widths.items()))
            for one in made
        ),
    )
    blocks: list[PageElement] = [
        bars,
        Key(tuple(KeyEntry(_bits(width), WIDTHS[width], shape="square") for width in used)),
    ]
    blocks += _gains(made)
    maps = [(one.label, _maps(one)) for one in sorted(made, key=lambda one: one is not first)]
    blocks.append(Picker("Plan", tuple(maps)))
    experts = any(unit.role == "expert" for one in made for unit, _ in one.places)
    reading = (
        "A plan gives every matrix a width, the bits of each stored weight; scales are stored in addition and are in "
        "the byte account. "
    )
    reading += (
        "In the map a cell is an expert and its colour the mean width of its matrices, which the hover text lists; the "
        "smaller map shows the units that are not routed experts."
        if experts
        else "In the map a cell is one matrix."
    )
    return Section("Bits", "Bits per expert" if experts else "Bits per matrix", reading, blocks)


def _gains(made: Sequence[Allocation]) -> list[PageElement]:
    """What plans are expected to gain over uniform ones of the same bytes."""
    names = sorted({name for one in made for name in one.gains}, key=lambda name: (name == SELF, name))
    if not names:
        return []
    rows = tuple(
        (one.label, *(str(one.gains.get(name, number(None))).replace("-", "\u2212") for name in names))
        for one in made if one.gains
    )  # fmt: skip
    meaning = (
        "Foretold by the profile, not measured: how much of the divergence of a uniform plan of the same bytes a plan "
        "saves. In brackets, where that lies with a probability of 95 %, as far as it depends on the samples."
    )
    return [Table("Expected gain over uniform", ("Plan", *names), rows), Note(meaning)]


def _bits(width: int) -> str:
    return "16 bit (kept)" if width == 16 else f"{width} bit"


def _maps(one: Allocation) -> tuple[PageElement, ...]:
    experts = [(unit, width) for unit, width in one.places if unit.role == "expert" and unit.expert is not None]
    others = [(unit, width) for unit, width in one.places if unit.role != "expert"]
    charts = [_expert_map(experts)] if experts else []
    if others:
        charts.append(_other_map(others))
    return (CellGrid(tuple(charts), Scale("sequential", "1 bit", "8 bit or more", "width"), lead=len(charts) > 1),)


def _expert_map(places: Sequence[tuple[UnitRecord, int]]) -> Chart:
    layers = sorted({unit.layer for unit, _ in places})
    columns = max(unit.expert or 0 for unit, _ in places) + 1
    projections = sorted({unit.projection for unit, _ in places}, key=_order)
    table = np.full((len(layers), columns, len(projections)), np.nan, dtype=np.float32)
    for unit, width in places:
        table[layers.index(unit.layer), unit.expert or 0, projections.index(unit.projection)] = width
    present = ~np.isnan(table)
    counts = present.sum(-1)
    mean = np.where(counts > 0, np.where(present, table, 0).sum(-1) / np.maximum(counts, 1), np.nan)
    each = "".join(f"\n{name}: {{{i}}} bit" for i, name in enumerate(projections))
    hover = "layer {y}, expert {x}\nmean width {z:.2f}" + each
    tables = [table[..., i] for i in range(len(projections))]
    return heat_map("Routed experts: mean width", mean, layers, hover, _LIMITS, more=tables)


def _other_map(places: Sequence[tuple[UnitRecord, int]]) -> Chart:
    layers = sorted({unit.layer for unit, _ in places})
    columns = sorted({_column(unit) for unit, _ in places}, key=_order)
    total, count = (np.zeros((len(layers), len(columns)), dtype=np.float32) for _ in range(2))
    for unit, width in places:
        cell = layers.index(unit.layer), columns.index(_column(unit))
        total[cell] += width
        count[cell] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    roles = sorted({unit.role for unit, _ in places})
    title = f"{' and '.join(roles).capitalize()} units: width"
    return heat_map(title, mean, layers, "layer {y}\n{x}: {z} bit", _LIMITS, axes=("", "layer"), x=columns)


def _column(unit: UnitRecord) -> str:
    return f"shared {unit.projection}" if unit.role == "shared" else unit.projection


def _order(name: str) -> tuple[int, str]:
    """Sort key that puts projections in the order in which data flows through them."""
    flow = ("q_", "k_", "v_", "qkv", "o_", "gate", "w1", "up", "w3", "down", "w2")
    places = [i for i, part in enumerate(flow) if name.removeprefix("shared ").startswith(part)]
    return (100 if name.startswith("shared ") else 0) + (places[0] if places else 50), name
