"""Sections on quality: the table of all evaluated models, and divergence against size."""

import math
from collections.abc import Sequence

from moqa.planning import STRATEGIES
from moqa.reports.blocks import (
    Cell,
    CellGrid,
    Chart,
    Key,
    KeyEntry,
    Note,
    PageElement,
    QualityRow,
    QualityTable,
    Section,
    Table,
    number,
    signed,
)  # fmt: skip
from moqa.reports.charts import braces, chart, line
from moqa.reports.palette import strategy_colour
from moqa.reports.rows import ROLES, Role, Row, best, series, size_groups
from moqa.reports.verdict import OURS, Comparison, comparisons
from moqa.storage.paths import label

_SHAPES = ("circle", "diamond", "square", "triangle-up")


def table_section(rows: Sequence[Row]) -> Section | None:
    """Section with sizes and qualities of all evaluated models."""
    if not rows:
        return None
    groups = []
    originals = [row for row in rows if row.original]
    if originals:
        groups.append(("Original", tuple(_line(row, False, False) for row in originals)))
    for group in size_groups(rows):
        known, novel = (best([row.divergence(role) for row in group]) for role in ROLES)
        sizes = [row.mebibytes for row in group]
        ends = dict.fromkeys(f"{size:.2f}" for size in (min(sizes), max(sizes)))
        lines = tuple(_line(row, i in known, i in novel) for i, row in enumerate(group))
        groups.append((f"{' to '.join(ends)} MiB", lines))
    blocks: list[PageElement] = [QualityTable(rows[0].names["known"], rows[0].names["novel"], tuple(groups))]
    blocks += [Note(text) for text in _footnotes(rows)]
    pairs = comparisons(rows)
    if pairs:
        blocks.append(_against_uniform(pairs))
    reading = (
        "KL divergence (nats per token) measures how far a checkpoint's predictions are from the original's: 0 is the "
        "same model, less is better. The small number below it is the perplexity. Rows under one heading have the same "
        "size within 0.5 % and can be compared; the best mean of each group is green."
    )
    if all(rows[0].names.values()):
        reading += (
            " Known distributions were used for the fit, novel ones were not; the best row on novel texts comes first."
        )
    return Section("Quality", "Size and quality", reading, blocks)


def size_section(rows: Sequence[Row]) -> Section | None:
    """Section with charts of divergence against bytes."""
    found = [role for role in ROLES if any(row.divergence(role) for row in rows)]
    lines = series(rows)
    if not found or not lines:
        return None
    values = [v for row in rows for role in found if (v := row.divergence(role)) and not row.original]
    if not values:
        return None
    limits = (math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.12)
    charts = tuple(_chart(lines, role, limits) for role in found)
    reading = (
        "Down and to the left is better: less divergence from the original in fewer bytes. Both charts share the "
        "logarithmic axis; hover over a point to see its numbers."
    )
    return Section("Size", "Quality against size", reading, [Key(_key(lines)), CellGrid(charts)])


def _line(row: Row, known: bool, novel: bool) -> QualityRow:
    e = row.evaluation
    return QualityRow(
        name=e.strategy or "original", method=e.method or "", hedge="" if e.hedge is None else f"{e.hedge:g}",
        sizes=(f"{row.mebibytes:.2f}", number(e.bits_per_weight), number(e.model_bits_per_weight)),
        known=_cells(row, "known", known), novel=_cells(row, "novel", novel),
        colour=strategy_colour(e.strategy or "original"), tip=f"{label(e.model)}: {e.bytes} bytes",
    )  # fmt: skip


def _cells(row: Row, role: Role, is_best: bool) -> tuple[Cell, ...]:
    """The mean first, then every distribution."""
    scores = [row.quality(name) for name in row.names[role]]
    each = [Cell(number(q.kl_divergence, 4), number(q.perplexity)) if q else Cell(number(None)) for q in scores]
    return (Cell(number(row.divergence(role), 4), best=is_best), *each) if each else ()


def _footnotes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        fitted = row.evaluation.fitted_on
        if not row.original and not set(row.names["known"]) <= set(fitted):
            text = ", ".join(fitted) or "no text"
            notes.append(f"{row.name} at {row.mebibytes:.2f} MiB was fitted on {text} only.")
    contexts = sorted({row.evaluation.context for row in rows})
    if len(contexts) > 1:
        notes.append(f"The windows differ ({', '.join(map(str, contexts))} tokens): such rows cannot be compared.")
    return notes


def _against_uniform(pairs: Sequence[Comparison]) -> Table:
    heads = ("Checkpoint", "MiB", "uniform MiB", "KL, known", "KL, novel", "Result")
    words = {"win": "better", "lose": "worse", "mixed": "mixed", "equal": "equal", "open": "\u2014"}
    rows = [
        (pair.ours.name, number(pair.ours.mebibytes), number(pair.baseline.mebibytes),
         *(signed(pair.changes.get(role)) for role in ROLES), words[pair.outcome])
        for pair in pairs
    ]  # fmt: skip
    return Table("Against uniform of the same size and method", heads, tuple(rows), words=(0, 5))


def _key(lines: Sequence[tuple[str, list[Row]]]) -> tuple[KeyEntry, ...]:
    """Marker of each line: the colour shows the strategy, a hollow marker plain rounding, the shape the hedge."""
    first = [(name, group[0].evaluation) for name, group in lines]
    hedges = sorted({e.hedge for _, e in first if e.hedge is not None}, key=lambda h: (h != STRATEGIES[OURS].hedge, h))
    return tuple(
        KeyEntry(name, strategy_colour(e.strategy or ""), e.method == "rtn",
                 _SHAPES[hedges.index(e.hedge) % len(_SHAPES)] if e.hedge is not None else _SHAPES[0])
        for name, e in first
    )  # fmt: skip


def _chart(lines: Sequence[tuple[str, list[Row]]], role: Role, limits: tuple[float, float]) -> Chart:
    traces = []
    for (name, group), style in zip(lines, _key(lines), strict=True):
        drawn = [(row, value) for row in group if (value := row.divergence(role))]
        symbol, colour = style.shape + ("-open" if style.hollow else ""), style.colour
        mark = {"size": 9, "symbol": symbol, "color": colour[0], "line": {"width": 2, "color": colour[0]}}
        traces.append(
            line(
                [row.mebibytes for row, _ in drawn], [value for _, value in drawn], name, colour, "%{customdata}",
                line={"dash": "dot" if style.hollow else "solid", "width": 1.5}, mode="lines+markers", marker=mark,
                customdata=[_hover(row) for row, _ in drawn],
            )
        )  # fmt: skip
    steps = [float(f"{step}e{power}") for power in range(-7, 3) for step in (1, 2, 5)]
    ticks = [step for step in steps if limits[0] <= math.log10(step) <= limits[1]]
    layout = {
        "xaxis": {"title": {"text": "MiB of all weight files"}, "zeroline": False},
        "yaxis": {"title": {"text": "mean KL divergence, nats per token"}, "type": "log", "range": limits,
                  "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "automargin": True},
    }  # fmt: skip
    return chart(f"{role.capitalize()} texts", traces, layout, 380)


def _hover(row: Row) -> str:
    e = row.evaluation
    head = f"<b>{braces(row.name)}</b><br>{row.mebibytes:.2f} MiB, {e.bits_per_weight:.2f} bits per weight"
    lines = [head]
    for role, names in row.names.items():
        if (mean := row.divergence(role)) is not None:
            lines.append(f"<b>{role}: {mean:.4f}</b>")
        scores = [(name, row.quality(name)) for name in names]
        lines += [
            f"{braces(name)}: {number(q.kl_divergence, 4)} (perplexity {q.perplexity:.2f})" for name, q in scores if q
        ]
    return "<br>".join(lines)
