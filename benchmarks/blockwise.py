"""Block-wise training of the random model of 441 M parameters: time and memory of every block.

Writes runs/trained/blockwise.json, which `benchmarks/trained.py` puts on its page.
"""

import json
import time
from itertools import pairwise

from demo import texts
from random_model import ROOT, make
from scale_stage import Watch

import moqa
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import resident
from moqa.profiling import read_profile

RUNS = ROOT / "runs" / "trained"
FOUND = RUNS / "blockwise.json"
STEPS, LIMIT, WINDOWS, CONTEXT = 20, "3GiB", 32, 256


def main() -> None:
    """Make the model and its checkpoint if they are missing, and train it."""
    model, profile, packed = (RUNS / name for name in ("random-model", "random-profile", "random-checkpoint"))
    if not (model / "config.json").exists():
        make(model)
    if not (profile / "profile.json").exists():
        moqa.profile(
            model,
            texts("calib", ("wiki",)),
            profile,
            samples=WINDOWS,
            context=CONTEXT,
            self_samples=8,
            sensitivity=False,
        )
    measured = read_profile(profile)
    if not (packed / "moqa.json").exists():
        plan = moqa.plan(measured, None, strategy="uniform", widths=(2,))
        moqa.quantize(model, plan, packed, profile=measured, method="rtn")
    watch, before, limit = Watch(), resident(), MemoryLimit.parse(LIMIT)
    began, ends = time.perf_counter(), dict[int, float]()

    def report(*_: object, **facts: int) -> None:
        watch.layer = facts["layer"]
        ends[watch.layer] = time.perf_counter()

    done = moqa.recover(
        packed, RUNS / "out-random", length=str(STEPS), profile=measured, model=model, memory=limit,
        report=report, overwrite=True, restart=True,
    ).recovery  # fmt: skip
    times = [began, *ends.values()]
    FOUND.write_text(json.dumps({
        "blockwise": done.blockwise, "steps": STEPS, "limit": LIMIT, "before": done.before, "after": done.after,
        "seconds": round(time.perf_counter() - began, 1), "resident_before": before,
        "seconds_by_block": [round(b - a, 1) for a, b in pairwise(times)],
        "peak_by_block": [watch.peaks[block] for block in sorted(ends)], "peak": max(watch.peaks.values()),
    }, indent=1))  # fmt: skip
    print(FOUND.read_text())


if __name__ == "__main__":
    main()
