"""Federated training with six allocations: runs/federated/summary.json and the tables of docs/results/federated.md.

    python benchmarks/federated_study.py            # what is missing of the measured part, then the summary
    python benchmarks/federated_study.py --summary  # of what is there

Every run is a folder of `moqa federated run`, so the study goes on after a kill.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch

from moqa.errors import MoqaError
from moqa.federated import Experiment, run
from moqa.federated.clients import samples_of
from moqa.federated.driver import RECORD, summarized
from moqa.federated.measure import batch_loss, train_steps
from moqa.federated.modes import FULL, LocalMode, in_mode
from moqa.federated.records import FederatedRecord
from moqa.federated.simulation import clock_of, model_of, optimizers_of
from moqa.storage.artifact import read_json, write_json

OUT = Path("runs/federated")
PAGE, ROWS = Path("docs/results/federated.md"), "## All rows\n"
ALLOCATIONS = ("qat", "ptq", "coarse+fine", "random-hybrid", "coarse", "fp")
SEEDS = range(3)
# rows that differ in none of these are of one table
GROUPED = (
    "data", "clients", "heterogeneity", "link", "attackers", "trim", "rate", "secure", "optimizer", "qat_cost", "depth",
)  # fmt: skip
# what alone the simulated clock depends on: where all clients do the same, it changes no step of training
CLOCK = ("heterogeneity", "link", "flops", "bandwidth", "qat_cost", "target")
SHALLOW = {
    "data": "fashion-mnist", "split": 0.1, "samples": 4000, "test_samples": 1000, "rounds": 30, "rate": 0.02,
    "target": 0.65,
}  # fmt: skip
FASHION = {**SHALLOW, "depth": 2, "rounds": 20}
CIFAR = {**FASHION, "data": "cifar10", "samples": 2500, "rounds": 15, "target": 0.25}
TEXT = {
    "data": "text", "samples": 800, "test_samples": 150, "rounds": 6, "batch": 16, "optimizer": "adamw",
    "rate": 0.003, "target": 0.22,
}  # fmt: skip
# with 0.1 every draw leaves some of 100 clients without data
MANY = {"clients": 100, "split": 0.5, "samples": 6000, "rounds": 10}
SLOW = {"bits": 2, "heterogeneity": 8}
# seconds of a step with rounding over one without, as `--costs` measures them
COSTS = {"fashion-mnist": 2.0, "cifar10": 1.85, "text": 1.8}
# of the grid, each with equal clients, too
PARTS = {
    "fashion": FASHION, "cifar10": CIFAR, "text": TEXT, "fashion-100": {**FASHION, **MANY, "target": 0.5},
    "cifar10-100": {**CIFAR, **MANY}, "text-100": {**TEXT, **MANY, "split": float("inf")},
}  # fmt: skip


def experiments() -> Iterator[tuple[str, Experiment]]:
    """Name and experiment, what tells most first."""
    yield from _part("fashion", 8, 0)
    yield from _part("fashion", 8, 1, ("qat", "ptq", "coarse+fine"))
    yield from _part("text", 8, 0)
    yield from _part("fashion", 8, 2, ("qat", "ptq", "coarse+fine"))
    for seed in (1, 2):
        yield from _part("fashion", 8, seed)
    yield from _part("cifar10", 8, 0)
    yield from _part("fashion-100", 8, 0)
    yield from _beside()
    for heterogeneity in (8, 1):
        for seed in SEEDS:
            for name in PARTS:
                yield from _part(name, heterogeneity, seed)


def _beside() -> Iterator[tuple[str, Experiment]]:
    """Single questions beside the grid, with the model of three convolutions and a clock that counts operations."""
    for allocation in ALLOCATIONS:
        yield f"fashion-roofline-{allocation}", Experiment(**SHALLOW, **SLOW, allocation=allocation)
    cifar = {**SHALLOW, "data": "cifar10", "samples": 2500, "rounds": 15, "target": 0.25}
    for allocation in ("qat", "coarse+fine"):
        yield f"cifar10-roofline-{allocation}", Experiment(**cifar, **SLOW, allocation=allocation)
        many = {**SHALLOW, **MANY, **SLOW, "target": 0.5}
        yield f"fashion-100-roofline-{allocation}", Experiment(**many, allocation=allocation)
        yield f"fashion-secure-{allocation}", Experiment(**SHALLOW, **SLOW, allocation=allocation, secure=True)
    fast = {**SHALLOW, "rate": 0.05}  # clients of this split drift apart
    for seed in (0, 1):
        for allocation in ALLOCATIONS:
            yield f"fashion-fast-{allocation}-{seed}", Experiment(**fast, **SLOW, allocation=allocation, seed=seed)
    for trim in (0.0, 0.2):
        for share in (0.0, 0.2):
            attack = {"split": 0.5, "rounds": 12, "allocation": "qat", "bits": 2, "attackers": share, "trim": trim}
            yield f"attack-{share}-trim-{trim}", Experiment(**{**fast, **attack})
    for allocation in ("fp", "coarse+fine", "qat"):
        slow = {**fast, **SLOW, "link": 5e4, "allocation": allocation}
        yield f"fashion-slow-link-{allocation}", Experiment(**slow)
    plain = {**TEXT, "optimizer": None, "samples": 1200, "test_samples": 300, "rounds": 12, "rate": 0.3, "target": 0.18}
    yield "text-sgd-qat", Experiment(**plain, **SLOW, allocation="qat")


def _part(
    name: str, heterogeneity: int, seed: int, allocations: Sequence[str] = ALLOCATIONS
) -> Iterator[tuple[str, Experiment]]:
    """One seed of a part of the grid."""
    fields = PARTS[name] | {"bits": 2, "heterogeneity": heterogeneity, "seed": seed}
    fields["qat_cost"] = COSTS[fields["data"]]
    for allocation in allocations:
        yield f"{name}-{heterogeneity}x-{allocation}-{seed}", Experiment(**fields, allocation=allocation)


def reclocked(experiment: Experiment, records: Iterable[FederatedRecord]) -> FederatedRecord | None:
    """The record of an experiment from one that differs in its clock alone; None if there is none, or it matters."""
    if experiment.allocation not in ("fp", "ptq", "qat"):
        return None
    same = experiment.model_dump(exclude=set(CLOCK))
    record = next((one for one in records if one.experiment.model_dump(exclude=set(CLOCK)) == same), None)
    if record is None:
        return None
    clock, counts = clock_of(experiment), np.bincount(samples_of(experiment).clients).tolist()
    rounds = []
    for one in record.rounds:
        each = (one.uplink_bytes + one.downlink_bytes) / max(len(one.modes), 1)  # all clients have equal messages
        seconds = [clock.seconds(client, kind, counts[client], each) for client, kind in one.modes.items()]
        rounds.append(one.model_copy(update={"seconds": max(seconds, default=0.0)}))
    return summarized(experiment, rounds)


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


def row(record: FederatedRecord) -> dict:
    """One row of the summary."""
    one = record.experiment
    return {
        "data": one.data, "split": str(one.split), "clients": one.clients, "heterogeneity": one.heterogeneity,
        "bits": 32 if one.allocation == "fp" else one.bits, "allocation": one.allocation, "seed": one.seed,
        "final_accuracy": record.final_accuracy, "seconds_to_target": record.seconds_to_target, "real_seconds": None,
        "uplink_bytes": record.uplink_bytes, "downlink_bytes": record.downlink_bytes,
        "allocator_seconds": record.allocator_seconds, "seconds": record.seconds, "link": one.link,
        "target": one.target, "rounds": one.rounds, "samples": one.samples, "attackers": one.attackers,
        "trim": one.trim, "rate": one.rate, "secure": one.secure, "optimizer": one.optimizer,
        "qat_cost": one.qat_cost, "depth": one.depth,
        "exact_accuracy": record.rounds[-1].metrics["accuracy-exact"],
        "wall_seconds": sum(each.real_seconds for each in record.rounds),
        "qat_share": _qat_share(record),
    }  # fmt: skip


def _qat_share(record: FederatedRecord) -> float:
    modes = [kind for each in record.rounds for kind in each.modes.values()]
    return sum(kind == "qat" for kind in modes) / len(modes)


def table(rows: list[dict]) -> str:
    """Mean and spread over seeds, as Markdown."""
    groups = defaultdict(list)
    for one in rows:
        groups[tuple(one[name] for name in GROUPED)].append(one)
    text = []
    for group in groups.values():
        first = group[0]
        extra = ""
        if first["data"] != "text":
            extra += f", depth {first['depth']}"
            if len({one["allocation"] for one in group}) == 1:
                extra += f", {first['attackers']:.0%} attackers, trim {first['trim']}"
        extra += ", secure aggregation" if first["secure"] else ""
        extra += f", {first['optimizer']}" if first["optimizer"] else ""
        extra += f", QAT {first['qat_cost']} times as long" if first["qat_cost"] else ", operations counted"
        text += [
            f"**{first['data']}, split {first['split']}, {first['clients']} clients, {first['heterogeneity']:g}x, "
            f"{first['link'] / 1e6:g} MB/s{extra}** "
            f"({first['samples']} samples, {first['rounds']} rounds, rate {first['rate']}, "
            f"target {first['target']:.0%})",
            "",
            "| allocation | seeds | accuracy | s to target | s in all | QAT | MiB up | MiB down | allocator s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for allocation in ALLOCATIONS:
            own = [one for one in group if one["allocation"] == allocation]
            if own:
                text.append(f"| {allocation} | {_cells(own)} |")
        text.append("")
    return "\n".join(text)


def missing(records: list[FederatedRecord]) -> str:
    """A line for each part of the grid: how many of its runs are there."""
    there = {record.experiment.model_dump_json() for record in records}
    lines = ["| part of the grid | runs | of |", "|---|---:|---:|"]
    for heterogeneity in (8, 1):
        for name in PARTS:
            runs = [experiment for seed in SEEDS for _, experiment in _part(name, heterogeneity, seed)]
            done = sum(one.model_dump_json() in there for one in runs)
            lines.append(f"| {name}, {heterogeneity}x | {done} | {len(runs)} |")
    return "\n".join([*lines, ""])


def processes() -> str:
    """Rounds of `federated_processes.py`, as Markdown."""
    path = OUT / "processes.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    text = []
    for name, title in (("rounds", "Four SuperNodes, two throttled"), ("secure", "The same with secure aggregation")):
        if rounds := found.get(name):
            text += [
                f"**{title}**",
                "",
                "| round | seconds | modes | accuracy | KiB up | said |",
                "|---:|---:|---|---:|---:|---|",
            ]
        for one in rounds or ():
            modes = " ".join(f"{client}:{mode}" for client, mode in sorted(one["modes"].items()))
            text.append(
                f"| {one['round']} | {one['real_seconds']:.1f} | {modes} | {one['metrics']['accuracy']:.1%} | "
                f"{one['uplink_bytes'] / 1024:.1f} | {'; '.join([*one['refused'], *one['changes']])} |"
            )
        text.append("")
    return "\n".join(text)


def write_page(parts: list[str]) -> None:
    """Replace the tables of the page; the text above them is written by hand."""
    text = PAGE.read_text(encoding="utf-8").partition(ROWS)[0]
    PAGE.write_text("\n".join([text + ROWS, *parts]).rstrip() + "\n", encoding="utf-8")


def _cells(own: list[dict]) -> str:
    reached = [one["seconds_to_target"] for one in own]
    to_target = "not reached" if None in reached else _spread(reached, ".1f")
    return " | ".join([
        str(len(own)), _spread([100 * one["final_accuracy"] for one in own], ".1f"), to_target,
        _spread([one["seconds"] for one in own], ".1f"), f"{mean(one['qat_share'] for one in own):.0%}",
        f"{mean(one['uplink_bytes'] for one in own) / 2**20:.2f}",
        f"{mean(one['downlink_bytes'] for one in own) / 2**20:.2f}",
        f"{mean(one['allocator_seconds'] for one in own):.2f}",
    ])  # fmt: skip


def _spread(values: list[float], digits: str) -> str:
    return f"{mean(values):{digits}}" + (f" ± {stdev(values):{digits}}" if len(values) > 1 else "")


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
    began, there = time.monotonic(), dict[str, FederatedRecord]()
    wanted = dict(experiments())
    for name, experiment in wanted.items():
        path = OUT / "study" / name / RECORD
        if path.is_file():
            there[name] = read_json(FederatedRecord, path)
            if there[name].experiment != experiment:
                raise SystemExit(f"{path.parent} is of another experiment: remove it")
    for name, experiment in wanted.items():
        found = there.get(name) or reclocked(experiment, there.values())
        if found is None and not options.summary and time.monotonic() - began < 60 * options.minutes:
            try:
                found = run(experiment, OUT / "study" / name)
            except MoqaError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            said = f"{found.final_accuracy:.3f} {found.seconds_to_target} {found.seconds:.1f}"
            print(time.strftime("%H:%M:%S"), name, said, flush=True)
        if found is not None:
            there[name] = found
    records = [there[name] for name in wanted if name in there]
    write_json({"rows": [row(one) for one in records]}, OUT / "summary.json")
    write_page([missing(records), table([row(one) for one in records]), processes()])


if __name__ == "__main__":
    main()
