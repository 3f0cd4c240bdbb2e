"""The related methods on the reference model: runs/related/summary.json, docs/results/related.json and a page for each.

Rows that were measured before with the same content are used again, from runs/related/rows or from related.json, so a
stopped study goes on where it was, and one more seed costs that seed. With `--finished` nothing is measured: what is
there is written.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import related_calibration
import related_components
import related_dense
import related_experts
import related_merge
import related_placement
from related_page import write_pages
from related_rows import Rows, say
from related_tables import ROWS, read_rows

RUNS = related_placement.RUNS
STUDIES: list[Callable[[Rows, tuple[int, ...]], list[dict[str, Any]]]] = [
    related_experts.study, related_merge.study, related_calibration.study, related_components.study,
    related_placement.study, related_dense.study,
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


def with_kept(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kept rows in their order, each replaced by the new one of its setting and seed, and then all others."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["system"], row["model"], row["setting"], row["seed"]

    return list(({key(row): row for row in kept} | {key(row): row for row in rows}).values())


def finished(folder: Path) -> list[dict[str, Any]]:
    """Rows of a study that is still going on."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found += [related_merge.control(row) for row in found if row["system"] == "emr-merging"]
    return sorted(found, key=lambda row: (row["system"], row["seed"], row.get("budget", 0), row["setting"]))


def main() -> None:
    seeds = tuple(int(seed) for seed in sys.argv[1:] if seed.isdecimal()) or (0, 1, 2)
    if "--finished" in sys.argv:
        write(with_kept(finished(RUNS / "rows"), read_rows()))
        return
    rows: list[dict[str, Any]] = []
    for study in STUDIES:
        rows += study(Rows(RUNS / "rows"), seeds)
        say(f"{study.__module__} is done")
    # of the seeds that were measured, nothing stays that no study has any more
    write(with_kept(rows, [row for row in read_rows() if row["seed"] not in seeds]))


if __name__ == "__main__":
    main()
