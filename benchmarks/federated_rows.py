"""Rows of the federated study: every finished run in docs/results/federated.json, from which the study goes on."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moqa.federated import Experiment
from moqa.federated.clients import samples_of
from moqa.federated.driver import summarized
from moqa.federated.records import FederatedRecord, RoundRecord
from moqa.federated.simulation import clock_of
from moqa.storage.artifact import write_whole

ROWS = Path("docs/results/federated.json")
# what alone the simulated clock depends on: where all clients do the same, it changes no step of training
_CLOCK = {"heterogeneity", "link", "flops", "bandwidth", "qat_cost", "target"}
_ALIKE = ("fp", "ptq", "qat")
_LETTERS = {"fp": "f", "ptq": "p", "qat": "q"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}


def row(record: FederatedRecord) -> dict[str, Any]:
    """A run as a row: what the summary shows, and the course from which it is computed again."""
    one = record.experiment
    kinds = [kind for each in record.rounds for kind in each.modes.values()]
    return {
        "data": one.data, "split": str(one.split), "clients": one.clients, "heterogeneity": one.heterogeneity,
        "bits": 32 if one.allocation == "fp" else one.bits, "allocation": one.allocation, "seed": one.seed,
        "final_accuracy": round(record.final_accuracy, 5), "seconds_to_target": record.seconds_to_target,
        "real_seconds": None, "uplink_bytes": record.uplink_bytes, "downlink_bytes": record.downlink_bytes,
        "allocator_seconds": round(record.allocator_seconds, 4), "seconds": record.seconds,
        "exact_accuracy": record.rounds[-1].metrics["accuracy-exact"],
        "wall_seconds": round(sum(each.real_seconds for each in record.rounds), 2),
        "qat_share": sum(kind == "qat" for kind in kinds) / len(kinds),
        "experiment": one.model_dump(mode="json", exclude_defaults=True),
        "course": [_compact(each, one.clients) for each in record.rounds],
        "said": [line for each in record.rounds for line in (*each.refused, *each.changes)],
    }  # fmt: skip


def record(found: dict[str, Any]) -> FederatedRecord:
    """The run of a row, without what was said in each round."""
    return summarized(
        Experiment.model_validate(found["experiment"]), [_round(*each) for each in enumerate(found["course"])]
    )


def read() -> list[dict[str, Any]]:
    """Rows that are kept in the tree."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.is_file() else []


def processes() -> dict[str, Any]:
    """Rounds of `federated_processes.py` that are kept in the tree."""
    return json.loads(ROWS.read_text(encoding="utf-8")).get("processes", {}) if ROWS.is_file() else {}


def write(rows: Iterable[dict[str, Any]], real: dict[str, Any]) -> None:
    """Keep rows, each on a line, and rounds of real processes."""
    lines = ",\n".join(json.dumps(one, sort_keys=True) for one in rows)
    rounds = json.dumps(real, sort_keys=True)
    write_whole(ROWS, f'{{"processes": {rounds},\n"rows": [\n{lines}\n]}}\n')


def known(experiment: Experiment, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of an experiment, from one that differs in nothing but what no step of training depends on.

    That is the target, and where all clients do the same the clock.
    """
    free = _CLOCK if experiment.allocation in _ALIKE else {"target"}
    same = experiment.model_dump(exclude=free)
    for one in rows:
        if any(one[name] != getattr(experiment, name) for name in ("allocation", "data", "clients", "seed")):
            continue
        other = record(one)
        if other.experiment == experiment:
            return one
        if other.experiment.model_dump(exclude=free) == same:
            rounds = other.rounds
            if other.experiment.model_dump(exclude={"target"}) != experiment.model_dump(exclude={"target"}):
                rounds = _reclocked(experiment, rounds)
            return {**row(summarized(experiment, rounds)), "said": one["said"]}
    return None


def _reclocked(experiment: Experiment, rounds: list[RoundRecord]) -> list[RoundRecord]:
    clock, counts = clock_of(experiment), np.bincount(samples_of(experiment).clients).tolist()
    found = []
    for one in rounds:
        each = (one.uplink_bytes + one.downlink_bytes) / max(len(one.modes), 1)  # all clients have equal messages
        seconds = [clock.seconds(client, kind, counts[client], each) for client, kind in one.modes.items()]  # type: ignore[arg-type]
        found.append(one.model_copy(update={"seconds": max(seconds, default=0.0)}))
    return found


def _compact(one: RoundRecord, clients: int) -> list[Any]:
    modes = "".join(_LETTERS[one.modes[client]] if client in one.modes else "-" for client in range(clients))
    right = [round(one.metrics[name], 5) for name in ("accuracy", "accuracy-exact")]
    return [
        float(f"{one.seconds:.6g}"), *right, one.uplink_bytes, one.downlink_bytes,
        round(one.allocator_seconds, 4), round(one.real_seconds, 2), modes if one.modes else "",
    ]  # fmt: skip


def _round(number: int, course: list[Any]) -> RoundRecord:
    seconds, accuracy, exact, up, down, allocator, real, modes = course
    return RoundRecord(
        round=number, seconds=seconds, real_seconds=real, allocator_seconds=allocator, uplink_bytes=up,
        downlink_bytes=down, metrics={"accuracy": accuracy, "accuracy-exact": exact},
        modes={client: _KINDS[letter] for client, letter in enumerate(modes) if letter in _KINDS},
    )  # fmt: skip
