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
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch

from moqa.errors import MoqaError
from moqa.federated import Experiment, run
from moqa.federated.driver import RECORD
from moqa.federated.records import FederatedRecord
from moqa.storage.artifact import read_json, write_json

OUT = Path("runs/federated")
PAGE, ROWS = Path("docs/results/federated.md"), "## All rows\n"
ALLOCATIONS = ("qat", "ptq", "coarse+fine", "random-hybrid", "coarse", "fp")
FASHION = {"data": "fashion-mnist", "split": 0.1, "samples": 4000, "test_samples": 1000, "rounds": 30, "target": 0.65}
CALM = {**FASHION, "rate": 0.02}  # clients of this split drift apart at the rate of 0.05
TEXT = {"data": "text", "samples": 1200, "test_samples": 300, "rounds": 12, "rate": 0.3, "batch": 16, "target": 0.18}
CIFAR = {**CALM, "data": "cifar10", "samples": 2500, "rounds": 15, "target": 0.25}
# with 0.1 every draw leaves some of 100 clients without data
MANY = {**CALM, "clients": 100, "split": 0.5, "samples": 6000, "rounds": 10, "target": 0.5}
SLOW = {"bits": 2, "heterogeneity": 8}
# of the grid: experiment, heterogeneity, seeds
PARTS = {
    "fashion-calm": (CALM, 8, 3), "cifar10": (CIFAR, 8, 3), "text": (TEXT, 8, 3), "fashion-100": (MANY, 8, 3),
    "fashion": (FASHION, 8, 3), "fashion-calm-equal": (CALM, 1, 3), "cifar10-equal": (CIFAR, 1, 3),
    "text-equal": (TEXT, 1, 3), "fashion-100-equal": (MANY, 1, 3),
}  # fmt: skip


def experiments() -> Iterator[tuple[str, Experiment]]:
    """Name and experiment, what matters most first."""
    yield from _part("fashion-calm", 0)
    # the hybrid and all-QAT on all data first, then more seeds and allocations
    for name in ("cifar10", "fashion-100"):
        yield from _part(name, 0, ("qat", "coarse+fine"))
    for allocation in ("coarse+fine", "qat"):
        yield f"fashion-calm-secure-{allocation}", Experiment(**CALM, **SLOW, allocation=allocation, secure=True)
    for name, seed in (("cifar10", 0), ("fashion-calm", 1), ("fashion-100", 0), ("fashion-calm", 2), ("text", 0)):
        yield from _part(name, seed, ("qat", "ptq", "coarse+fine"))
    for seed in (0, 1):
        yield from _part("fashion", seed)
    for trim in (0.0, 0.2):
        for share in (0.0, 0.2):
            attack = {"split": 0.5, "rounds": 12, "allocation": "qat", "bits": 2, "attackers": share, "trim": trim}
            yield f"attack-{share}-trim-{trim}", Experiment(**{**FASHION, **attack})
    for allocation in ("fp", "coarse+fine", "qat"):
        slow = {**FASHION, **SLOW, "link": 5e4, "allocation": allocation}
        yield f"fashion-slow-link-{allocation}", Experiment(**slow)
    for name, (_, _, seeds) in PARTS.items():
        for seed in range(seeds):
            yield from _part(name, seed)


def _part(name: str, seed: int, allocations: Sequence[str] = ALLOCATIONS) -> Iterator[tuple[str, Experiment]]:
    """One seed of a part of the grid."""
    fields, heterogeneity, _ = PARTS[name]
    for allocation in allocations:
        more = {"bits": 2, "heterogeneity": heterogeneity, "allocation": allocation, "seed": seed}
        yield f"{name}-{heterogeneity}x-{allocation}-{seed}", Experiment(**{**fields, **more})


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
        "trim": one.trim, "rate": one.rate, "secure": one.secure,
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
        key = ("data", "clients", "heterogeneity", "link", "attackers", "trim", "rate", "secure")
        groups[tuple(one[name] for name in key)].append(one)
    text = []
    for (data, clients, heterogeneity, link, attackers, trim, rate, secure), group in groups.items():
        extra = f", {attackers:.0%} attackers, trim {trim}" if len({one["allocation"] for one in group}) == 1 else ""
        extra += ", secure aggregation" if secure else ""
        first = group[0]
        text += [
            f"**{data}, split {first['split']}, {clients} clients, {heterogeneity:g}x, {link / 1e6:g} MB/s{extra}** "
            f"({first['samples']} samples, {first['rounds']} rounds, rate {rate}, target {first['target']:.0%})", "",
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
    for name, (_, heterogeneity, seeds) in PARTS.items():
        runs = [experiment for seed in range(seeds) for _, experiment in _part(name, seed)]
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
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began, records = time.monotonic(), []
    for name, experiment in dict(experiments()).items():
        folder = OUT / "study" / name
        record = read_json(FederatedRecord, folder / RECORD) if (folder / RECORD).is_file() else None
        if record is not None and record.experiment != experiment:
            raise SystemExit(f"{folder} is of another experiment: remove it")
        late = time.monotonic() - began > 60 * options.minutes
        if record is None and not options.summary and not late:
            try:
                record = run(experiment, folder)
            except MoqaError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            print(
                time.strftime("%H:%M:%S"),
                name,
                f"{record.final_accuracy:.3f}",
                record.seconds_to_target,
                f"{record.seconds:.1f}",
                flush=True,
            )
        if record is not None:
            records.append(record)
            write_json({"rows": [row(one) for one in records]}, OUT / "summary.json")
    write_page([missing(records), table([row(one) for one in records]), processes()])


if __name__ == "__main__":
    main()
