"""Mixed precision of a policy: plans by alignment against others of the same bytes, hypotheses, and closed loops.

    python benchmarks/vla_study.py                     # all of it
    python benchmarks/vla_study.py --episodes 10 --seeds 1

Writes runs/vla/summary.json and docs/results/vla.md. Every row is kept: started again, the study goes on.
"""

import argparse
import json
from collections.abc import Iterator, Sequence

from vla_page import write_page
from vla_rows import (
    CLOSED_LOOP,
    CLOSED_SIZES,
    CONTROLS,
    OTHERS,
    RUNS,
    SIZES,
    WANTED_SIZES,
    Made,
    Study,
    closed_loop,
    speed,
)  # fmt: skip

from moqa.storage.artifact import write_json

WIDTHS = (3, 2, 4, 8)


def grid(study: Study, sizes: Sequence[float], randoms: int) -> Iterator[dict]:
    """Plans of the same bytes by action error."""
    for size in sizes:
        yield study.row(Made(f"uniform-{size:g}", "uniform", size, study.plan("uniform", size)))
        for by in OTHERS:
            for seed in range(randoms if by == "random" else 1):
                name = f"{by}-{size:g}" + (f"-{seed}" if seed else "")
                yield study.row(Made(name, by, size, study.plan(by, size, seed), seed=seed))


def hypotheses(study: Study) -> Iterator[dict]:
    """Each hypothesis by plans of its own."""
    for size in WANTED_SIZES:
        name = f"hypothesis-projector-16-{size:g}"
        yield study.row(Made(name, name, size, study.plan("aligned", size, floors={"projector": 16})))
    for width in WIDTHS:
        for part in ("projector", "language", "vision", "action"):
            for method in ("rtn", "gptq"):
                name = f"hypothesis-only-{part}-{width}-{method}"
                yield study.row(Made(name, name, width, study.only(part, width), method))
        name = f"hypothesis-only-projector-{width}-blank"
        yield study.row(Made(name, name, width, study.only("projector", width, blank=True), blank=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=80, help="observations of the profile")
    parser.add_argument("--episodes", type=int, default=20, help="of each task and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--randoms", type=int, default=3, help="random plans of each size")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    study, measured = Study(options.samples), RUNS / "speed.json"
    rows, looped, fast = [study.original(), study.blind()], list[dict](), dict[str, list[dict]]()
    for row in grid(study, SIZES, options.randoms):
        rows.append(row)
        _write(rows, looped, fast, study)
    by_name = {(row["plan"], row["size"]): row for row in rows if row["seed"] == 0}
    if not measured.exists():
        chosen = {"original": rows[0], **{f"{plan}-3": by_name[plan, 3.0] for plan in ("uniform", "aligned")}}
        write_json({name: [speed(row, n) for n in (1, 2)] for name, row in chosen.items()}, measured)
    fast = json.loads(measured.read_text())
    for row in hypotheses(study):
        rows.append(row)
        _write(rows, looped, fast, study)
    for seed in range(options.seeds):
        # where the robot fails more often, the episodes of one seed tell the plans apart
        sizes = CLOSED_SIZES if seed == 0 else WANTED_SIZES
        for plan, size in (*CONTROLS, *((plan, size) for size in sizes for plan in CLOSED_LOOP)):
            looped.append(closed_loop(by_name[plan, size], seed, options.episodes, options.processes))
            _write(rows, looped, fast, study)


def _write(rows: list[dict], looped: list[dict], fast: dict, study: Study) -> None:
    done = {(row["plan"], row["size"], row["seed"]) for row in looped}
    others = [row for row in rows if (row["plan"], row["size"], row["seed"]) not in done]
    write_json({"rows": [*looped, *others], "speed": fast}, RUNS / "summary.json")
    write_page(looped, rows, fast, study.profile)


if __name__ == "__main__":
    main()
