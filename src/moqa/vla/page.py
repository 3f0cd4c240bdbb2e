"""The profile of a policy as one HTML page: which unit moves what, parts at several widths, and gradients."""

import numpy as np
from torch import Tensor

from moqa.profiling import Profile
from moqa.profiling.record import ProfileRecord
from moqa.reports.blocks import Key, KeyEntry, Section, Table
from moqa.reports.charts import heat_map, line, line_chart, linear, logarithmic, upper
from moqa.reports.page import write_page
from moqa.reports.palette import LINES
from moqa.reports.verdict import Verdict
from moqa.vla.shifts import PART_WIDTHS, SHIFTS

_PAGE_WIDTHS = (2, 3, 4)


def render(profile: Profile) -> str:
    """Render the page of a policy's profile.

    >>> "Sensitivity" in render(profile)  # doctest: +SKIP
    True
    """
    record = profile.record
    parts = list(dict.fromkeys(unit.role for unit in record.units))
    name, tables = next(iter(profile.statistics.items()))
    action = tables["shift.action"][:, record.widths.index(3)]
    most = int(action.argmax())
    sentence = f"At 3 bits, {record.units[most].name} moves the actions most, of {len(record.units)} units."
    weights = {part: sum(unit.weights for unit in record.units if unit.role == part) for part in parts}
    figures = [(f"{count:,}", f"weights of {part}", "") for part, count in weights.items()]
    sections = [_units(record, tables), _parts(parts, tables), _gradients(parts, tables, name)]
    return write_page(record.model, Verdict(sentence), figures, sections)


def _units(record: ProfileRecord, tables: dict[str, Tensor]) -> Section:
    charts = []
    columns = [record.widths.index(width) for width in _PAGE_WIDTHS if width in record.widths]
    for shift in SHIFTS:
        values = np.sqrt(tables[f"shift.{shift}"][:, columns].numpy()).T
        charts.append(
            heat_map(
                f"{shift}, square root", values, [record.widths[column] for column in columns],
                "unit {x} at {y} bits: {z:.4f}", (0.0, upper(values)), axes=("unit", "bits"), height=180,
            )
        )  # fmt: skip
    reading = "Each column is one unit, in the order in which an observation passes them; all others are exact."
    # a name is too long for a column
    names = tuple((str(number), unit.name) for number, unit in enumerate(record.units))
    key = Table("", ("unit", "name"), names, words=(0, 1))
    return Section("Units", "Sensitivity of each unit", reading, [*charts, key])


def _parts(parts: list[str], tables: dict[str, Tensor]) -> Section:
    entries = tuple(KeyEntry(part, colour) for part, colour in zip(parts, LINES, strict=False))
    charts = []
    for shift in SHIFTS:
        table = tables[f"part.{shift}"].clamp_min(1e-9).sqrt()
        lines = [
            line(PART_WIDTHS, table[number].tolist(), entry.colour, [f"{entry.label}: {v:.4f}" for v in table[number]])
            for number, entry in enumerate(entries)
        ]
        low, high = float(table.min()), float(table.max())
        axes = linear("bits", PART_WIDTHS, whole=True), logarithmic(shift, low / 1.1, high * 1.1)
        charts.append(line_chart(f"{shift}, square root", lines, *axes, 260))
    reading = "All units of one part at the same width, the other parts exact."
    return Section("Parts", "Whole parts", reading, [Key(entries), *charts])


def _gradients(parts: list[str], tables: dict[str, Tensor], name: str) -> Section:
    rows = [(f"weights of {part}", f"{float(g):.3g}") for part, g in zip(parts, tables["gradient.parts"], strict=True)]
    for place, value in zip(("projected tokens", "embedded words"), tables["gradient.tokens"], strict=True):
        rows.append((place, f"{float(value):.3g}"))
    reading = f"Root mean square of the gradient of the error of the actions against the expert's, on {name}."
    return Section("Gradients", "Gradients of each part", reading, [Table("", ("at", "gradient"), tuple(rows))])
