"""Sections on quality: the table of all evaluated models, and divergence against size."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from moqa.reports.charts import line, line_chart, linear, logarithmic
from moqa.reports.palette import strategy_colour
from moqa.reports.rows import OURS, ROLES, Role, Row, best, series, size_groups
from moqa.reports.verdict import Comparison, comparisons

_SHAPES = ("circle", "diamond", "square", "triangle-up")


def table_section(rows: Sequence[Row], ours: Row | None = None) -> Section | None:
    """Section with sizes and qualities of all evaluated models, compared with the original and with one of ours."""
    if not rows:
        return None
    groups = []
    originals = [row for row in rows if row.original]
    beside = _Beside(originals[0] if originals else None, ours)
    if originals:
        groups.append(("Original", tuple(_line(row, beside) for row in originals)))
    for group in size_groups(rows):
        known, novel = (best([row.divergence(role) for row in group]) for role in ROLES)
        sizes = [row.mebibytes for row in group]
        ends = dict.fromkeys(f"{size:.2f}" for size in (min(sizes), max(sizes)))
        lines = tuple(_line(row, beside, i in known, i in novel) for i, row in enumerate(group))
        groups.append((f"{' to '.join(ends)} MiB", lines))
    blocks: list[PageElement] = [QualityTable(rows[0].names["known"], rows[0].names["novel"], tuple(groups))]
    blocks += [Note(text) for text in _footnotes(rows)]
    pairs = comparisons(rows)
    if pairs:
        blocks.append(_against_uniform(pairs))
    reading = (
        "KL divergence (nats per token) measures how far a checkpoint's predictions are from the original's: 0 is the "
        "same model, less is better. The small number below it is the perplexity, with its change from the original's; "
        "below a mean, the mean as a multiple of ours. Rows under one heading have the same size within 0.5 % and can "
        "be compared; the best mean of each group is green."
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
    limits = (min(values) / 1.3, max(values) * 1.3)
    charts = tuple(_chart(lines, role, limits) for role in found)
    reading = (
        "Down and to the left is better: less divergence from the original in fewer bytes. Both charts share the "
        "logarithmic axis; hover over a point to see its numbers."
    )
    return Section("Size", "Quality against size", reading, [Key(_key(lines)), CellGrid(charts)])


@dataclass(frozen=True)
class _Beside:
    """What rows are compared with: the original, and one of our checkpoints."""

    original: Row | None
    ours: Row | None

    def share(self, row: Row) -> str:
        """Size as a share of the original's."""
        if self.original is None or row.original:
            return ""
        return f"{row.evaluation.bytes / self.original.evaluation.bytes * 100:.0f} % of original"

    def perplexity(self, row: Row, name: str) -> str:
        """Perplexity, and by how much it differs from the original's."""
        own, first = row.quality(name), self.original.quality(name) if self.original else None
        assert own is not None
        if first is None or row.original:
            return number(own.perplexity)
        return f"{number(own.perplexity)} {signed(own.perplexity / first.perplexity - 1, 1)}"

    def multiple(self, row: Row, role: Role) -> str:
        """Mean divergence as a multiple of ours."""
        value, ours = row.divergence(role), self.ours.divergence(role) if self.ours else None
        if row is self.ours:
            return "ours"
        return f"{value / ours:.2f} \u00d7 ours" if value and ours else ""


def _line(row: Row, beside: _Beside, known: bool = False, novel: bool = False) -> QualityRow:
    e = row.evaluation
    bits = (Cell(number(e.bits_per_weight)), Cell(number(e.model_bits_per_weight)))
    return QualityRow(
        name=row.kind, made=row.made, known=_cells(row, "known", beside, known),
        novel=_cells(row, "novel", beside, novel), sizes=(Cell(f"{row.mebibytes:.2f}", beside.share(row)), *bits),
        colour=strategy_colour(row.kind), tip=f"{row.name}: {e.bytes:,} bytes",
    )  # fmt: skip


def _cells(row: Row, role: Role, beside: _Beside, is_best: bool) -> tuple[Cell, ...]:
    """The mean first, then every distribution."""
    scores = {name: row.quality(name) for name in row.names[role]}
    each = [
        Cell(number(q.kl_divergence, 4), beside.perplexity(row, name)) if q else Cell(number(None))
        for name, q in scores.items()
    ]
    return (Cell(number(row.divergence(role), 4), beside.multiple(row, role), best=is_best), *each) if each else ()


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
    kinds = {name: group[0].kind for name, group in lines}
    usual = STRATEGIES[OURS].hedge
    defaults = {usual(e.bits_per_weight) for _, e in first if usual is not None}
    hedges = sorted({e.hedge for _, e in first if e.hedge is not None}, key=lambda h: (h not in defaults, h))
    return tuple(
        KeyEntry(name, strategy_colour(kinds[name]), e.method == "rtn",
                 _SHAPES[hedges.index(e.hedge) % len(_SHAPES)] if e.hedge is not None else _SHAPES[0])
        for name, e in first
    )  # fmt: skip


def _chart(lines: Sequence[tuple[str, list[Row]]], role: Role, limits: tuple[float, float]) -> Chart:
    drawn = []
    for (_, group), style in zip(lines, _key(lines), strict=True):
        points = [(row, value) for row in group if (value := row.divergence(role))]
        drawn.append(
            line([row.mebibytes for row, _ in points], [value for _, value in points], style.colour,
                 [_hover(row) for row, _ in points], dash="dot" if style.hollow else "solid", marker=style.shape,
                 hollow=style.hollow)
        )  # fmt: skip
    x = linear("MiB of all weight files", [row.mebibytes for _, group in lines for row in group])
    y = logarithmic("mean KL divergence, nats per token", *limits)
    return line_chart(f"{role.capitalize()} texts", drawn, x, y, 380)


def _hover(row: Row) -> str:
    e = row.evaluation
    lines = [row.name, f"{row.mebibytes:.2f} MiB, {e.bits_per_weight:.2f} bits per weight"]
    for role, names in row.names.items():
        if (mean := row.divergence(role)) is not None:
            lines.append(f"{role}: {mean:.4f}")
        scores = [(name, row.quality(name)) for name in names]
        lines += [f"{name}: {number(q.kl_divergence, 4)} (perplexity {q.perplexity:.2f})" for name, q in scores if q]
    return "\n".join(lines)
