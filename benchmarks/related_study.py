"""The related methods on the reference model: runs/related/summary.json, docs/results/related.json and a page for each.

Rows that were measured before with the same content are used again, so a stopped study goes on where it was.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import related_calibration
import related_components
import related_experts
import related_merge
import related_placement
from related_page import ROWS, write_pages
from related_rows import Rows, say

RUNS = related_placement.RUNS
STUDIES: list[Callable[[Rows, tuple[int, ...]], list[dict[str, Any]]]] = [
    related_experts.study, related_merge.study, related_calibration.study, related_components.study,
    related_placement.study,
]  # fmt: skip
NEEDED = (
    "system",
    "setting",
    "control",
    "model",
    "seed",
    "bits_per_weight",
    "bytes",
    "kl_known",
    "kl_novel",
    "accuracy",
)


def rounded(value: Any) -> Any:
    """Numbers as they are written: six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(rows: list[dict[str, Any]]) -> None:
    """Write all rows, and the pages."""
    rows = [rounded(row) for row in rows]
    for row in rows:
        assert all(key in row for key in NEEDED), f"a row lacks one of {NEEDED}: {row}"
    text = json.dumps({"rows": rows}, indent=1, sort_keys=True) + "\n"
    (RUNS / "summary.json").write_text(text)
    ROWS.write_text(text)
    write_pages(rows)


def finished(rows: Path) -> list[dict[str, Any]]:
    """Rows of a study that is still going on."""
    found = [json.loads(path.read_text()) for path in sorted(rows.glob("*.json"))]
    base = [
        {key: value for key, value in row.items() if not key.endswith("_merged")}
        | {"setting": "the base for all", "control": True, "kl_known": row["kl_base"], "bits_per_weight": 16.0}
        for row in found
        if row["system"] == "emr-merging"
    ]
    return sorted([*found, *base], key=lambda row: (row["system"], row.get("budget", 0), row["seed"], row["setting"]))


def main() -> None:
    seeds = tuple(int(seed) for seed in sys.argv[1:] if seed.isdecimal()) or (0, 1, 2)
    rows: list[dict[str, Any]] = []
    if "--finished" in sys.argv:
        rows = finished(RUNS / "rows")
    else:
        for study in STUDIES:
            rows += study(Rows(RUNS / "rows"), seeds)
            say(f"{study.__module__} is done")
    write(rows)


if __name__ == "__main__":
    main()
