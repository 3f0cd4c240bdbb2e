"""What the pages of the related methods are made of: rows of related.json, their means over seeds, lines and tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
ROWS = RESULTS / "related.json"
Row = dict[str, Any]
COMMAND = "Command: `make related-study` (`benchmarks/related_{}.py`; rows in [related.json](related.json))."


def read_rows() -> list[Row]:
    """The rows that were written last; `content` names what each depends on."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.is_file() else []


def of(rows: Sequence[Row], system: str) -> list[Row]:
    return [row for row in rows if row["system"] == system]


def one(rows: Sequence[Row], setting: str) -> Row | None:
    """The row of a setting, mean over seeds; `each` has the rows of the seeds."""
    found = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["seed"])
    if not found:
        return None
    keys = [key for key, value in found[0].items() if isinstance(value, float)]
    return found[0] | {"each": found} | {key: sum(row[key] for row in found) / len(found) for key in keys}


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def seeds(rows: Sequence[Row]) -> str:
    return count_of(len({row["seed"] for row in rows}), "seed")


def verdict(holds: bool, text: str) -> str:
    return f"- {'holds' if holds else 'MISS '}  {text}"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in lines)])


def kl(row: Row, role: str) -> str:
    """A divergence with half of its interval over windows, and from the least to the largest of the seeds."""
    values = [found[f"kl_{role}"] for found in row["each"]]
    text = f"{row[f'kl_{role}']:.4f} ± {row.get(f'kl_{role}_interval', 0.0):.4f}"
    return f"{text} ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else text


def in_seeds(ours: Row, theirs: Row, key: str) -> str:
    """In how many of the seeds that both have ours is less; nothing for a single seed."""
    other = {row["seed"]: row[key] for row in theirs["each"]}
    less = [row[key] < other[row["seed"]] for row in ours["each"] if row["seed"] in other]
    return f" (less in {sum(less)} of {len(less)} seeds)" if len(less) > 1 else ""


def below(ours: float, theirs: float) -> str:
    return f"{100 * (1 - ours / theirs):.0f} % below" if ours <= theirs else f"{100 * (ours / theirs - 1):.0f} % above"
