"""Claims and tables of docs/results/federated.md from the study's rows; the text between them is written by hand."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from claims import claim
from federated_grid import ALLOCATIONS, HETEROGENEITIES, PARTS, SEEDS, SLOW_LINK, part

PAGE = Path("docs/results/federated.md")
CLAIMS, CAUSES, TABLES = "## What holds, and what does not\n", "## What is behind it\n", "## All rows\n"
_NAMES = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "text": "text"}
Row = dict[str, Any]


def write_page(rows: dict[str, Row], real: dict[str, Any]) -> None:
    """Replace the claims and the tables of the page."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(CLAIMS)
    causes = rest.partition(CAUSES)[2].partition(TABLES)[0]
    tables = "\n".join([missing(rows), table(list(rows.values())), processes(real)])
    text = f"{head}{CLAIMS}{claims(rows)}\n{CAUSES}{causes}{TABLES}\n{tables}"
    PAGE.write_text(text.rstrip() + "\n", encoding="utf-8")


def claims(rows: dict[str, Row]) -> str:
    """What the issue of the grid wants, part by part, with as many seeds as there are."""
    lines = []
    for heterogeneity in HETEROGENEITIES:
        for name, fields in PARTS.items():
            seeds = [
                {one.allocation: rows[run] for run, one in part(name, heterogeneity, seed) if run in rows}
                for seed in SEEDS
            ]
            whole = [each for each in seeds if {"qat", "ptq", "coarse+fine"} <= each.keys()]
            if whole:
                kind, _, many = name.partition("-")
                where = f"{_NAMES[kind]}, {many or 10} clients, {heterogeneity}x"
                lines += _of_part(where, whole, heterogeneity > 1, fields.get("split") == 0.1)
    return "\n".join([*lines, *_beside(rows), ""])


def _of_part(where: str, seeds: list[dict[str, Row]], slowed: bool, skewed: bool) -> list[str]:
    lines = []

    def add(holds: bool, text: str, number: str) -> None:
        lines.append(claim(holds, f"{where}, {text}: {number}"))

    def points(one: str, other: str) -> list[float]:
        both = [each for each in seeds if {one, other} <= each.keys()]
        return [100 * (each[one]["final_accuracy"] - each[other]["final_accuracy"]) for each in both]

    if slowed:
        whole = mean(each["qat"]["seconds"] / each["coarse+fine"]["seconds"] for each in seeds)
        add(whole >= 1.5, f"time of as many rounds, all-QAT over the hybrid, {_of(seeds)}", f"{whole:.2f}; wanted 1.5")
        reach = [
            each for each in seeds if each["qat"]["seconds_to_target"] and each["coarse+fine"]["seconds_to_target"]
        ]
        if reach:
            ratio = mean(each["qat"]["seconds_to_target"] / each["coarse+fine"]["seconds_to_target"] for each in reach)
            text = f"time to the target accuracy, all-QAT over the hybrid, {_of(reach)}"
            add(ratio >= 1.5, text, f"{ratio:.2f}; wanted 1.5")
    below = mean(points("qat", "coarse+fine"))
    add(below <= 1, f"points of accuracy of the hybrid below all-QAT, {_of(seeds)}", f"{below:.1f}; wanted 1")
    if skewed:
        above = mean(points("coarse+fine", "ptq"))
        add(above >= 3, f"points of the hybrid above all-PTQ, {_of(seeds)}", f"{above:.1f}; wanted 3")
    for other in ("random-hybrid", "coarse"):
        if len(found := points("coarse+fine", other)) > 1:
            what = "a hybrid by lot" if other == "random-hybrid" else "the coarse stage alone"
            text = f"points of the hybrid above {what}, beyond the spread of {len(found)} seeds"
            add(mean(found) > stdev(found), text, _spread(found, ".1f"))
    part_ = max(each["coarse+fine"]["allocator_seconds"] / each["coarse+fine"]["wall_seconds"] for each in seeds)
    add(part_ < 0.01, f"percent of a run's real time that the allocator takes, at most, {_of(seeds)}",
        f"{100 * part_:.2f}; wanted 1")  # fmt: skip
    if with_fp := [each for each in seeds if "fp" in each]:
        ratio = mean(each["fp"]["uplink_bytes"] / each["coarse+fine"]["uplink_bytes"] for each in with_fp)
        ahead = mean(points("coarse+fine", "fp"))
        text = f"bytes that clients send, fp32 FedAvg over the hybrid, which has {ahead:+.1f} points, {_of(with_fp)}"
        add(ratio > 1, text, f"{ratio:.1f}")
    return lines


def _beside(rows: dict[str, Row]) -> list[str]:
    lines = []
    if {"slow-link-fp", "slow-link-coarse+fine"} <= rows.keys():
        full, hybrid = rows["slow-link-fp"], rows["slow-link-coarse+fine"]
        ratio = full["seconds"] / hybrid["seconds"]
        text = f"Fashion-MNIST, 8x, links of {SLOW_LINK / 1000:g} kB/s, time of as many rounds, all-FP over the hybrid"
        lines.append(claim(ratio >= 1.5, f"{text}: {ratio:.2f}; wanted 1.5"))
    robust, broken = rows.get("attack-0.2-trim-0.2"), rows.get("attack-0.2-trim-0.0")
    if robust and broken:
        text = (
            f"a fifth of the clients send noise: accuracy with the trimmed mean, {broken['final_accuracy']:.0%} without"
        )
        lines.append(claim(robust["final_accuracy"] > 0.5, f"{text}: {robust['final_accuracy']:.1%}"))
    return lines


def _of(seeds: Sequence[Any]) -> str:
    return f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"


def missing(rows: dict[str, Row]) -> str:
    """A line for each part of the grid: how many of its runs are there."""
    lines = ["| part of the grid | runs | of |", "|---|---:|---:|"]
    for heterogeneity in HETEROGENEITIES:
        for name in PARTS:
            runs = [run for seed in SEEDS for run, _ in part(name, heterogeneity, seed)]
            lines.append(f"| {name}, {heterogeneity}x | {sum(run in rows for run in runs)} | {len(runs)} |")
    return "\n".join([*lines, ""])


def table(rows: list[Row]) -> str:
    """Mean and spread over seeds, as Markdown."""
    groups = defaultdict(list)
    for one in rows:
        fields = {key: value for key, value in one["experiment"].items() if key not in ("allocation", "seed")}
        groups[str(sorted(fields.items()))].append(one)
    text = []
    for group in groups.values():
        text += [
            f"**{_title(group[0]['experiment'])}**",
            "",
            "| allocation | seeds | accuracy | s to target | s in all | QAT | MiB up | MiB down | allocator s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for allocation in ALLOCATIONS:
            own = [one for one in group if one["allocation"] == allocation]
            if own:
                text.append(f"| {allocation} | {_cells(own)} |")
        text.append("")
    return "\n".join(text)


def _title(fields: dict[str, Any]) -> str:
    said = [fields["data"], f"{fields.get('clients', 10)} clients", f"{fields.get('heterogeneity', 1):g}x"]
    said += [f"split {fields['split']}"] if "split" in fields else []
    said += [f"links of {fields['link'] / 1000:g} kB/s"] if "link" in fields else []
    said += ["secure aggregation"] if fields.get("secure") else []
    said += [f"{fields['attackers']:.0%} attackers"] if fields.get("attackers") else []
    said += [f"trim {fields['trim']}"] if fields.get("trim") else []
    rounds = f"{fields['samples']} samples, {fields['rounds']} rounds, target {fields['target']:.0%}"
    return f"{', '.join(said)} ({rounds})"


def processes(found: dict[str, Any]) -> str:
    """Rounds of `federated_processes.py`, as Markdown."""
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


def _cells(own: list[Row]) -> str:
    reached = [one["seconds_to_target"] for one in own if one["seconds_to_target"] is not None]
    to_target = _spread(reached, ".1f") if len(reached) == len(own) else f"{len(reached)} of {len(own)} reach it"
    return " | ".join([
        str(len(own)), _spread([100 * one["final_accuracy"] for one in own], ".1f"), to_target,
        _spread([one["seconds"] for one in own], ".1f"), f"{mean(one['qat_share'] for one in own):.0%}",
        f"{mean(one['uplink_bytes'] for one in own) / 2**20:.2f}",
        f"{mean(one['downlink_bytes'] for one in own) / 2**20:.2f}",
        f"{mean(one['allocator_seconds'] for one in own):.2f}",
    ])  # fmt: skip


def _spread(values: list[float], digits: str) -> str:
    return f"{mean(values):{digits}}" + (f" ± {stdev(values):{digits}}" if len(values) > 1 else "")
