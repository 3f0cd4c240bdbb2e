"""Section on adjustments: their cost, their gain, and the experts that they change."""

import numpy as np

from moqa.evaluation import Evaluation
from moqa.format.adjustment import Adjustment
from moqa.reports.blocks import CellGrid, PageElement, Scale, Section, Table, number, percent
from moqa.reports.charts import heat_map, upper
from moqa.reports.gather import Artifacts
from moqa.storage.paths import label

READING = (
    "An adjustment stores some rows and columns of experts again, with bits of their own, for texts that the "
    "checkpoint was not made for. The maps show where these are; before and after are measured on the same held-out "
    "text."
)


def adjustments_section(found: Artifacts) -> Section | None:
    """Section on all adjustments, and on evaluations with and without them."""
    if not found.adjustments and not any(e.adjustment for e in found.evaluations):
        return None
    blocks: list[PageElement] = []
    if found.adjustments:
        blocks.append(_made(found.adjustments))
    if changes := _changes(found.evaluations):
        names = ("model", "adjustment", "text", "KL before", "after", "change", "perplexity before", "after")
        blocks.append(Table("Before and after", names, tuple(changes), words=(0, 1, 2)))
    if found.adjustments:
        tables = [_counts(adjustment) for adjustment in found.adjustments]
        top = upper(np.concatenate([table.ravel() for table in tables]))
        hover = "layer {y}, expert {x}\n{z} rows and columns"
        maps = tuple(
            heat_map(f"{a.record.name}, {a.record.mode}", table, range(len(table)), hover, (0.0, top),
                     height=90 + 22 * len(table))
            for a, table in zip(found.adjustments, tables, strict=True)
        )  # fmt: skip
        blocks.append(CellGrid(maps, Scale("sequential", "0", f"{top:.0f} or more", "rows and columns of the expert")))
    return Section("Adjustments", "Adjustments to novel texts", READING, blocks)


def _made(adjustments: list[Adjustment]) -> Table:
    names = ("adjustment", "for", "mode", "rule", "samples", "rows and columns", "units with fewer bits", "extra bytes")
    rows = [
        (
            label(a.folder), a.record.name, a.record.mode, a.record.rule, str(a.record.samples),
            f"{sum(sum(part.counts) for part in a.record.channels):,}", str(len(a.record.units)),
            f"{a.record.extra_bytes:,}",
        )
        for a in adjustments
    ]  # fmt: skip
    return Table("Made", names, tuple(rows), words=(0, 1, 2, 3))


def _changes(evaluations: list[Evaluation]) -> list[tuple[str, ...]]:
    """One row per text of an adjusted evaluation, compared with the same model without adjustment."""
    rows: list[tuple[str, ...]] = []
    for after in (e for e in evaluations if e.adjustment):
        plain = [
            e for e in evaluations if e.adjustment is None and (e.model, e.context) == (after.model, after.context)
        ]
        for name, quality in after.distributions.items():
            before = next((e.distributions[name] for e in plain if name in e.distributions), None)
            old, new = (None if q is None else q.kl_divergence for q in (before, quality))
            change = new / old - 1 if new is not None and old else None
            rows.append((
                label(after.model), label(after.adjustment or ""), name, number(old, 4), number(new, 4),
                percent(change), number(before.perplexity if before else None), number(quality.perplexity),
            ))  # fmt: skip
    return rows


def _counts(adjustment: Adjustment) -> np.ndarray:
    """[layers, experts] number of adjusted rows and columns."""
    record = adjustment.record
    layers = len(record.channels[0].counts) if record.channels else 0
    table = np.zeros((layers, record.sizes.experts))
    for layer in range(layers):
        for part in adjustment.layer(layer):
            table[layer] += np.bincount(part.expert.numpy(), minlength=record.sizes.experts)
    return table
