"""An experiment as one HTML page: accuracy over time, who trained how, and why it changed."""

from collections import Counter

import numpy as np

from moqa.federated.records import FederatedRecord
from moqa.reports.blocks import Chart, Key, KeyEntry, Note, Section, Table
from moqa.reports.charts import line, line_chart, linear
from moqa.reports.page import write_page
from moqa.reports.palette import LINES
from moqa.reports.verdict import Verdict

_KINDS = ("fp", "ptq", "qat")


def render(record: FederatedRecord) -> str:
    """Render the page of an experiment."""
    experiment = record.experiment
    target = experiment.target
    if target is None:
        sentence = f"After {experiment.rounds} rounds the stored model has an accuracy of {record.final_accuracy:.1%}."
    elif record.seconds_to_target is None:
        sentence = (
            f"The target of {target:.1%} was not reached in {experiment.rounds} rounds: the best was "
            f"{record.best.metrics['accuracy']:.1%}, in round {record.best.round}."
        )
    else:
        sentence = f"The target of {target:.1%} was reached after {record.seconds_to_target:.1f} simulated seconds."
    figures = [
        (f"{record.final_accuracy:.1%}", "accuracy as stored, mean of the last rounds", ""),
        (f"{record.seconds:.1f} s", "of the simulated clock", ""),
        (f"{record.uplink_bytes / 2**20:.2f} MiB", "sent by clients", ""),
        (f"{record.downlink_bytes / 2**20:.2f} MiB", "sent to clients", ""),
    ]
    return write_page(experiment.data, Verdict(sentence), figures, [_course(record), _modes(record), _setup(record)])


def _course(record: FederatedRecord) -> Section:
    seconds = np.cumsum([one.seconds for one in record.rounds]).tolist()
    lines, entries = [], []
    for colour, (key, label) in zip(
        LINES, {"accuracy": "as it is stored", "accuracy-exact": "in full precision"}.items(), strict=False
    ):
        values = [one.metrics[key] for one in record.rounds]
        hover = [f"round {one.round}: {value:.1%}" for one, value in zip(record.rounds, values, strict=True)]
        lines.append(line(seconds, values, colour, hover))
        entries.append(KeyEntry(label, colour))
    axes = linear("simulated seconds", seconds, least=0.0), linear("accuracy", [0.0, 1.0], least=0.0)
    chart: Chart = line_chart("Accuracy on held-out samples", lines, *axes, 320)
    return Section("Course", "Course of the training", "Each point is a round.", [Key(tuple(entries)), chart])


def _modes(record: FederatedRecord) -> Section:
    rows = []
    for one in record.rounds:
        counts = Counter(one.modes.values())
        rows.append((
            str(one.round), *(str(counts.get(kind, 0)) for kind in _KINDS), f"{one.seconds:.3g}",
            f"{one.uplink_bytes:,}", f"{one.downlink_bytes:,}", f"{one.metrics['accuracy']:.1%}",
        ))  # fmt: skip
    heads = ("round", *_KINDS, "seconds", "bytes up", "bytes down", "accuracy")
    said = [line for one in record.rounds for line in (*one.refused, *one.changes)]
    notes = [Note(text) for text in said] or [Note("No client changed its mode, and no update was refused.")]
    reading = "Clients in each mode, and every change with its reason. Round 0 measures the clients."
    return Section("Modes", "Who trained how", reading, [Table("", heads, tuple(rows)), *notes])


def _setup(record: FederatedRecord) -> Section:
    values = record.experiment.model_dump(mode="json")
    rows = tuple((key, str(value)) for key, value in values.items() if value is not None)
    return Section("Setup", "Setup", "The file of the experiment.", [Table("", ("key", "value"), rows, words=(0, 1))])
