"""Rows of runs/low-bits/summary.json: what a tool makes of a model in so many bytes, and its quality on held-out text.

A row's key is its model, tool, setting and seed. What is there is not measured again, so that a run that was stopped
goes on, and rows of several machines can be put into one file.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from demo import KNOWN, NOVEL, ROOT, texts
from low_bits_page import write

import moqa
from moqa.evaluation.measure import Reference
from moqa.models.view import open_model
from moqa.profiling import Profile, read_profile
from moqa.progress import quiet

RUNS = ROOT / "runs" / "low-bits"
SUMMARY = RUNS / "summary.json"
CONTEXT = 256


class Model(NamedTuple):
    """What is quantized, where its files go, and how many windows of a text it is fitted and tested on."""

    name: str
    folder: Path
    runs: Path
    samples: int
    windows: int


def row(model: Model, tool: str, setting: str, seed: int, measure: Callable[[], dict]) -> dict:
    """The row of this key, measured and put into the summary and on the page if it is not there."""
    key = {"model": model.name, "tool": tool, "setting": setting, "seed": seed}
    found = next((old for old in _rows() if key.items() <= old.items()), None)
    if found is None:
        found = key | measure()
        print(json.dumps(found), flush=True)
        SUMMARY.write_text(json.dumps({"rows": [*_rows(), found]}, indent=1) + "\n")
    write(_rows())
    return found


def _rows() -> list[dict]:
    return json.loads(SUMMARY.read_text())["rows"] if SUMMARY.exists() else []


def quality(model: Model, folder: Path, size: int, weights: int) -> dict:
    """Bytes of all matrices of the layers, and what the model in a folder loses on held-out text."""
    found = moqa.evaluate(folder, texts("test", (*KNOWN, *NOVEL)), reference=reference_of(model)).distributions
    return {
        "bytes": size, "bits_per_weight": size * 8 / weights,
        "kl_known": mean(found[name].kl_divergence for name in KNOWN),
        "kl_novel": mean(found[name].kl_divergence for name in NOVEL),
        "top1_known": mean(found[name].top1_agreement for name in KNOWN),
    }  # fmt: skip


@cache
def reference_of(model: Model) -> Reference:
    """The original's outputs on held-out windows."""
    view = open_model(model.folder)
    reader = view.task.reader(model.folder)
    windows = [view.task.cut(text, reader, CONTEXT, model.windows) for text in texts("test", (*KNOWN, *NOVEL))]
    return Reference.of(view.model, windows, quiet)


@cache
def profile_of(model: Model, seed: int) -> Profile:
    """The profile of the known texts whose windows are drawn with a seed."""
    folder = model.runs / f"profile-{seed}"
    if not (folder / "profile.json").exists():
        moqa.profile(model.folder, texts("calib", KNOWN), folder, samples=model.samples, context=CONTEXT, seed=seed)
    return read_profile(folder)


def default_plan(model: Model, bits: float, seed: int) -> dict:
    """The default plan of so many bits, quantized and measured."""
    profile = profile_of(model, seed)
    return measured(model, profile, moqa.plan(profile, f"{bits}bpw"))


def measured(model: Model, profile: Profile, plan: moqa.Plan) -> dict:
    """A plan, quantized and measured from its packed files."""
    out = model.runs / "out"
    moqa.quantize(model.folder, plan, out, profile=profile, overwrite=True, restart=True)
    return quality(model, out, plan.account.units, plan.account.weights)
