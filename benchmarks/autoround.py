"""AutoRound beside moqa's default plan at its bytes, on the reference model and the same calibration windows.

AutoRound runs in an environment of its own (benchmarks/peers/) with its defaults but for the iterations, and leaves the
weights decoded; they are measured by moqa's evaluator. Its bytes are its integers, a 16-bit scale per group and, where
it is asymmetric, a zero-point as wide as a weight. Adds rows to runs/low-bits/summary.json.
"""

import argparse
import shutil
from functools import partial
from typing import NamedTuple

import torch
from demo import KNOWN, MODEL, texts
from low_bits_rows import CONTEXT, RUNS, Model, default_plan, quality, row
from peers import run
from safetensors.torch import load_file, save_file

from moqa.data import cut_windows
from moqa.tasks import TASKS
from moqa.tasks.causal_lm import load_tokenizer

GROUP = 64


class Setting(NamedTuple):
    bits: int
    symmetric: bool
    iterations: int

    def __str__(self) -> str:
        return f"W{self.bits} g{GROUP} {'symmetric' if self.symmetric else 'asymmetric'}, {self.iterations} iterations"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / GROUP


SETTINGS = (Setting(2, False, 200), Setting(3, True, 50), Setting(3, True, 200))


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter that has AutoRound")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 tokens per text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows per known text")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which a run is given up")
    options = parser.parse_args()
    model = Model("reference", MODEL, RUNS, options.samples, options.windows)
    for setting in SETTINGS:
        measure = partial(autoround_row, model, setting, options.python, options.limit)
        row(model, "autoround", str(setting), 0, measure)
        row(model, "moqa", str(setting), 0, partial(default_plan, model, setting.bits_per_weight, 0))


def autoround_row(model: Model, setting: Setting, python: str, limit: float) -> dict:
    """One run of AutoRound on the windows that the profile of the first seed has."""
    tokenizer = load_tokenizer(model.folder)
    windows = [cut_windows(text, tokenizer, CONTEXT, model.samples, seed=0).inputs for text in texts("calib", KNOWN)]
    job = {
        "tool": "auto_round", "model": str(model.folder), "out": "out", "bits": setting.bits, "group_size": GROUP,
        "symmetric": setting.symmetric, "iterations": setting.iterations, "windows": torch.cat(windows).tolist(),
        "batch": TASKS["causal_lm"].batch_size // CONTEXT,
    }  # fmt: skip
    folder = model.runs / "autoround"
    report = run(python, job, folder, limit)
    if "failed" in report:
        raise RuntimeError(report["failed"])
    shutil.copytree(model.folder, folder / "decoded")
    original = load_file(model.folder / "model.safetensors")
    ours = load_file(folder / "dense")
    matrices = [name for name in original if name.endswith("_proj.weight")]
    save_file(
        original | {name: ours[name] for name in matrices}, folder / "decoded" / "model.safetensors", {"format": "pt"}
    )
    weights = sum(original[name].numel() for name in matrices)
    return quality(model, folder / "decoded", int(setting.bits_per_weight * weights / 8), weights) | {
        "version": report["version"], "cpu_seconds": report["cpu_seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
