"""Federated training with six allocations: runs/federated/summary.json, docs/results/federated.json and its page.

    python benchmarks/federated_study.py            # what is missing of the grid, then the summary
    python benchmarks/federated_study.py --summary  # of what is there

Runs that docs/results/federated.json has are not run again; every other is a folder of `moqa federated run`, which goes
on after a kill, and becomes a row as soon as it is finished.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from federated_grid import CIFAR, FASHION, TEXT, experiments
from federated_page import write_page
from federated_rows import known, processes, read, row, write

from moqa.errors import MoqaError
from moqa.federated import Experiment, run
from moqa.federated.clients import samples_of
from moqa.federated.driver import RECORD, summarized
from moqa.federated.measure import batch_loss, train_steps
from moqa.federated.modes import FULL, LocalMode, in_mode
from moqa.federated.records import FederatedRecord
from moqa.federated.simulation import model_of, optimizers_of
from moqa.storage.artifact import read_json, write_json

OUT = Path("runs/federated")


def costs() -> dict[str, float]:
    """Seconds of this processor that a step with rounding takes over one without, medians of alternating steps."""
    found = {}
    for data, fields in {"fashion-mnist": FASHION, "cifar10": CIFAR, "text": TEXT}.items():
        experiment = Experiment(**fields, bits=2)
        batch, times = samples_of(experiment).test(experiment.batch)[0], defaultdict(list)
        with ExitStack() as stack:
            steps = {}
            for kind, mode in (("fp", LocalMode("fp", FULL)), ("qat", LocalMode("qat", 2))):
                model = stack.enter_context(in_mode(model_of(experiment), mode))
                steps[kind] = partial(train_steps, model, [batch], batch_loss, optimizers_of(experiment, model))
            for _ in range(50):
                for kind, step in steps.items():
                    began = time.thread_time()
                    step()
                    times[kind].append(time.thread_time() - began)
        found[data] = round(median(times["qat"][5:]) / median(times["fp"][5:]), 2)
    return found


def row_of(
    name: str, experiment: Experiment, rows: Sequence[dict[str, Any]], measure: bool = False
) -> dict[str, Any] | None:
    """The row of an experiment: of those that are there, of a finished run in the study's folder, or of a new one.

    None if it is not there and nothing is measured, or if it cannot be, saying why.

    Raises:
        SystemExit: if the folder is of another experiment.
    """
    folder = OUT / "study" / name
    try:
        if (found := known(experiment, rows)) is not None:
            return found
        if (folder / RECORD).is_file():
            one = read_json(FederatedRecord, folder / RECORD)
            if one.experiment.model_dump(exclude={"target"}) != experiment.model_dump(exclude={"target"}):
                raise SystemExit(f"{folder} is of another experiment: remove it")
            return row(summarized(experiment, one.rounds))
        return row(run(experiment, folder)) if measure else None
    except MoqaError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None


def summed_up(rows: dict[str, dict[str, Any]]) -> None:
    """Write summary, rows and page."""
    real_path = OUT / "processes.json"
    real = json.loads(real_path.read_text()) if real_path.is_file() else processes()
    write(rows.values(), real)
    write_json({"rows": list(rows.values())}, OUT / "summary.json")
    write_page(rows, real)


def main() -> None:
    parser = argparse.ArgumentParser(description="Federated training with six allocations.")
    parser.add_argument("--summary", action="store_true", help="only sum up what is there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--costs", action="store_true", help="only measure what rounding costs on this processor")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.costs:
        print(json.dumps(costs()))
        return
    began, kept, wanted = time.monotonic(), read(), dict(experiments())
    rows = {name: found for name, one in wanted.items() if (found := row_of(name, one, kept))}
    for name, experiment in wanted.items():
        late = time.monotonic() - began > 60 * options.minutes
        if name in rows or options.summary or late:
            continue
        if (found := row_of(name, experiment, [*rows.values()], measure=True)) is None:
            continue
        rows[name] = found
        print(time.strftime("%H:%M:%S"), name, f"{found['final_accuracy']:.3f} {found['seconds']:.1f}", flush=True)
        summed_up({name: rows[name] for name in wanted if name in rows})
    summed_up(rows)


if __name__ == "__main__":
    main()
