"""Rows of the studies of trained quantization: runs/trained/summary.json.

They cost hours, so docs/results/trained.json keeps them: rows that stand there are not measured again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "trained"
SUMMARY = RUNS / "summary.json"
KEPT = ROOT / "docs" / "results" / "trained.json"
Row = dict[str, Any]


def known(system: str, **wanted: object) -> list[Row]:
    """Rows of a study with some values."""
    return [
        row for row in _all() if row["system"] == system and all(row[key] == value for key, value in wanted.items())
    ]


def add(rows: Sequence[Row]) -> None:
    """Add rows to those that are there."""
    text = json.dumps({"rows": [*_all(), *rows]}, indent=1) + "\n"
    RUNS.mkdir(parents=True, exist_ok=True)
    for file in (KEPT, SUMMARY):
        file.write_text(text)


def _all() -> list[Row]:
    return json.loads(KEPT.read_text())["rows"] if KEPT.exists() else []
