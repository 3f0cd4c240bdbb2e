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
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch

from moqa.errors import MoqaError
from moqa.federated import Experiment, run
from moqa.federated.driver import RECORD
from moqa.federated.records import FederatedRecord
from moqa.storage.artifact import read_json, write_json

OUT = Path("runs/federated")
ALLOCATIONS = ("qat", "ptq", "coarse+fine", "random-hybrid", "coarse", "fp")
FASHION = {"data": "fashion-mnist", "split": 0.1, "samples": 4000, "test_samples": 1000, "rounds": 30, "target": 0.65}
TEXT = {"data": "text", "samples": 1200, "test_samples": 300, "rounds": 12, "rate": 0.3, "batch": 16, "target": 0.25}
CIFAR = {"data": "cifar10", "split": 0.1, "samples": 4000, "test_samples": 1000, "rounds": 20, "target": 0.3}
MANY = {**FASHION, "clients": 100, "samples": 6000, "rounds": 15, "target": 0.5}


def experiments() -> Iterator[tuple[str, Experiment]]:
    """Name and experiment, what matters most first."""
    for seed in (0, 1):
        yield from _each("fashion", FASHION, seed, heterogeneity=8)
    for trim in (0.0, 0.2):
        for share in (0.0, 0.2):
            attack = {"split": 0.5, "rounds": 12, "allocation": "qat", "bits": 2, "attackers": share, "trim": trim}
            yield f"attack-{share}-trim-{trim}", Experiment(**{**FASHION, **attack})
    for allocation in ("fp", "coarse+fine", "qat"):
        slow = {**FASHION, "bits": 2, "heterogeneity": 8, "link": 5e4, "allocation": allocation}
        yield f"fashion-slow-link-{allocation}", Experiment(**slow)
    for allocation in ("fp", "qat", "ptq", "coarse+fine"):  # is one rate fair to all?
        calm = {**FASHION, "bits": 2, "heterogeneity": 8, "rate": 0.02, "allocation": allocation}
        yield f"fashion-calm-{allocation}", Experiment(**calm)
    yield from _each("text", TEXT, 0, heterogeneity=8)
    yield from _each("fashion", FASHION, 2, heterogeneity=8)
    for seed in range(3):
        yield from _each("fashion", FASHION, seed, heterogeneity=1)
    yield from _each("cifar10", CIFAR, 0, heterogeneity=8)
    yield from _each("fashion-100", MANY, 0, heterogeneity=8)


def _each(name: str, fields: dict, seed: int, **more: float) -> Iterator[tuple[str, Experiment]]:
    for allocation in ALLOCATIONS:
        experiment = Experiment(**{**fields, "bits": 2, **more, "allocation": allocation, "seed": seed})
        yield f"{name}-{more['heterogeneity']}x-{allocation}-{seed}", experiment


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
        "trim": one.trim, "rate": one.rate, "exact_accuracy": record.rounds[-1].metrics["accuracy-exact"],
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
        key = ("data", "clients", "heterogeneity", "link", "attackers", "trim", "rate")
        groups[tuple(one[name] for name in key)].append(one)
    text = []
    for (data, clients, heterogeneity, link, attackers, trim, rate), group in groups.items():
        extra = f", {attackers:.0%} attackers, trim {trim}" if len({one["allocation"] for one in group}) == 1 else ""
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
    for name, experiment in experiments():
        folder = OUT / "study" / name
        record = read_json(FederatedRecord, folder / RECORD) if (folder / RECORD).is_file() else None
        late = time.monotonic() - began > 60 * options.minutes
        if record is None and not options.summary and not late:
            try:
                record = run(experiment, folder)
            except MoqaError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            print(name, f"{record.final_accuracy:.3f}", record.seconds_to_target, f"{record.seconds:.1f}", flush=True)
        if record is not None:
            records.append(record)
            write_json({"rows": [row(one) for one in records]}, OUT / "summary.json")
    print(table(json.loads((OUT / "summary.json").read_text())["rows"]))


if __name__ == "__main__":
    main()
