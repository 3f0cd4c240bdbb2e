"""Rows of the studies of trained quantization: runs/trained/summary.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "trained"
SUMMARY = RUNS / "summary.json"
Row = dict[str, Any]


def known(system: str, **wanted: object) -> list[Row]:
    """Rows of a study with some values."""
    return [
        row for row in _all() if row["system"] == system and all(row[key] == value for key, value in wanted.items())
    ]


def add(rows: Sequence[Row]) -> None:
    """Add rows to those that are there."""
    RUNS.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json.dumps({"rows": [*_all(), *rows]}, indent=1))


def _all() -> list[Row]:
    return json.loads(SUMMARY.read_text())["rows"] if SUMMARY.exists() else []
