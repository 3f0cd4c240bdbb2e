"""The page: all sections that have content, in one self-contained HTML text."""

import json
import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moqa import __version__
from moqa.profiling.store import Profile
from moqa.reports import palette
from moqa.reports.account import account_section, provenance_section
from moqa.reports.activation import activation_section
from moqa.reports.adjustments import adjustments_section
from moqa.reports.allocation import Allocation, allocations
from moqa.reports.bits import bits_section
from moqa.reports.blocks import Section, number, signed
from moqa.reports.gather import Artifacts
from moqa.reports.mixtures import mixtures_section
from moqa.reports.quality import size_section, table_section
from moqa.reports.rows import OURS, Row, make_rows
from moqa.reports.significance import significance_section
from moqa.reports.verdict import Verdict, verdict
from moqa.storage.paths import label


def render(found: Artifacts) -> str:
    """Render the whole page as HTML."""
    rows, made, profile = make_rows(found), allocations(found), found.profile
    judged = verdict(rows) if rows else Verdict(_unjudged(found, profile))
    sections = [
        table_section(rows, judged.comparison.ours if judged.comparison else None),
        size_section(rows),
        significance_section(profile) if profile else None,
        bits_section(made, _first(made, judged)),
        activation_section(profile) if profile else None,
        adjustments_section(found),
        mixtures_section(found),
        account_section(made),
        provenance_section(found, made, rows),
    ]
    return write_page(_model(found, rows), judged, _figures(judged, rows), [section for section in sections if section])


def write_page(
    model: str, judged: Verdict, figures: Sequence[tuple[str, str, str]], sections: Sequence[Section]
) -> str:
    """HTML of sections under a headline.

    Args:
        model: what the page is about.
        judged: the headline.
        figures: value, label and role of the numbers at the top.
        sections: that have content.
    """
    environment = Environment(
        loader=PackageLoader("moqa.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=tied,
    )  # fmt: skip
    environment.filters["embedded"] = embedded
    return environment.get_template("report.html.j2").render(
        model=model, verdict=judged, figures=figures, sections=sections, version=__version__, scales=palette.SCALES,
        palette=palette,
    )  # fmt: skip


def embedded(value: str | dict) -> Markup:
    """Escape JSON for a script element, which `<` could otherwise end.

    >>> embedded('{"name": "</script>"}')
    Markup('{"name": "\\\\u003c/script\\\\u003e"}')
    """
    text = value if isinstance(value, str) else json.dumps(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def tied(value: object) -> object:
    """Put a no-break space between every number and its unit.

    >>> tied("43 % below")
    '43\xa0% below'
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return re.sub(r"(?<=\d) (?=(?:%|MiB|bits?)(?:\W|$))", "\u00a0", value)
    return value


def _first(made: Sequence[Allocation], judged: Verdict) -> Allocation | None:
    """The plan of the verdict, or another plan of our strategy."""
    ours = [one for one in made if one.label.startswith(OURS)]
    if not judged.comparison:
        return ours[0] if ours else None
    row = judged.comparison.ours
    exact = [one for one in made if one.account.checkpoint == row.evaluation.bytes and one.label.startswith(OURS)]
    named = [one for one in exact if one.hedge == row.evaluation.hedge]
    return next(iter([*named, *exact, *ours]), None)


def _unjudged(found: Artifacts, profile: Profile | None) -> str:
    parts = []
    if profile:
        parts.append(f"a profile of {profile.record.model_type} on {', '.join(profile.names)}")
    for count, noun in (
        (len(found.plans), "plan"),
        (len(found.checkpoints), "checkpoint"),
        (len(found.mixtures), "mixture"),
    ):
        if count:
            parts.append(f"{count} {noun}{'s' if count > 1 else ''}")
    return f"Nothing was evaluated yet, so there is no verdict; this page shows {' and '.join(parts)}."


def _model(found: Artifacts, rows: Sequence[Row]) -> str:
    models = [record.model for record in found.records] + [label(row.evaluation.against or "") for row in rows]
    named = next(filter(None, models), "")
    parts = [part for part in named.replace("\\", "/").split("/") if part]
    return "/".join(parts[-2:])


def _figures(judged: Verdict, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Numbers at the top of the page: value, label, and the role of the texts if they are of one."""
    if not judged.comparison:
        return []
    pair = judged.comparison
    ours = pair.ours
    original = next((row for row in rows if row.original), None)
    share = f", {ours.evaluation.bytes / original.evaluation.bytes * 100:.0f} % of the original" if original else ""
    changes = [
        (signed(change), f"KL divergence against uniform, {role} texts", role) for role, change in pair.changes.items()
    ]
    return [
        *changes,
        (f"{ours.mebibytes:.2f} MiB", f"size{share}", ""),
        (number(ours.evaluation.bits_per_weight), "bits per weight, all stored bytes counted", ""),
    ]
