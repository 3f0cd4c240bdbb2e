"""MoEQuant on the reference model: text that is balanced over the experts, and gate-weighted Gram matrices."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moqa
from moqa.format.reader import open_checkpoint
from moqa.models.view import ModelView, open_model
from moqa.planning import Plan
from moqa.profiling import SELF
from moqa.profiling.balanced import balanced_sample, expert_counts
from moqa.profiling.selfsample import self_sample
from moqa.quantization import quantize
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from related_rows import Rows, Scores

RUNS = ROOT / "runs" / "related"
WIDTH, SAMPLES, WINDOWS = 3, 16, 4
COMPARED = 8  # windows of each kind of text whose use of experts is compared
TEXT = {name: 1 / len(KNOWN) for name in KNOWN}
# the text that units are quantized on, and the method
CASES = {
    "plain text": ("drawn", TEXT, "gptq"), "balanced own text": ("balanced", {SELF: 1.0}, "gptq"),
    "drawn own text": ("drawn", {SELF: 1.0}, "gptq"), "plain text, gates off": ("drawn", TEXT, "gptq-plain"),
    "plain text, gates on": ("drawn", TEXT, "gptq-affinity"),
}  # fmt: skip

OURS = ("balanced own text", "plain text, gates on")  # the paper's; all others are there to compare


def spread(view: ModelView, inputs: Tensor) -> float:
    """Standard deviation of the shares of the experts of a block, mean over blocks."""
    counts = expert_counts(view, inputs)
    return float((counts / counts.sum(1, keepdim=True)).std(dim=1, correction=0).mean())


def balance(view: ModelView, text: str, seed: int) -> dict[str, Any]:
    """How evenly some text uses experts; nothing is quantized."""
    if text == "plain text":
        cut = [view.task.cut(one, view.task.reader(MODEL), 256, COMPARED // 2, seed) for one in texts("calib", KNOWN)]
        inputs = torch.cat([windows.inputs for windows in cut])
    else:
        write = balanced_sample if text == "balanced own text" else self_sample
        inputs = write(view, COMPARED, 256, seed)
    return {
        "balance": spread(view, inputs), "samples": len(inputs), "windows": 0, "bits_per_weight": 16.0,
        "bytes": (MODEL / "model.safetensors").stat().st_size, "kl_known": None, "kl_novel": None, "accuracy": None,
    }  # fmt: skip


def measured(
    view: ModelView, own: str, mixture: dict[str, float], method: str, seed: int, scores: Scores
) -> dict[str, Any]:
    """Uniform 3 bits by a method, on a mixture of texts; `own` says how the model writes its own."""
    profile = moqa.profile(
        MODEL, texts("calib", KNOWN), RUNS / f"{own}-{seed}", seed=seed, samples=SAMPLES, own_text=own,
        sensitivity=False, view=view,
    )  # fmt: skip
    plan: Plan = moqa.plan(profile, None, strategy="uniform", widths=[WIDTH])
    plan = plan.model_copy(update={"mixture": mixture, "samples": profile.digest(mixture)})
    with temporary_folder() as folder:
        quantize(MODEL, plan, folder / "out", profile=profile, view=view, method=method)
        found = scores.of(load_packed(open_checkpoint(folder / "out"), kernels="reference"))
    return found | {
        "bits_per_weight": plan.account.bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None,
        "balance": None, "samples": SAMPLES, "windows": WINDOWS,
    }  # fmt: skip


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per text and method, uniform 3 bits."""
    view, found = open_model(MODEL), []
    scores = Scores(MODEL, texts("test", (*KNOWN, *NOVEL)), 256, WINDOWS, KNOWN)
    for seed in seeds:
        for name in ("plain text", "drawn own text", "balanced own text"):
            about = {
                "system": "moequant", "setting": f"spread of {name}", "control": name not in OURS, "model": "reference",
                "seed": seed,
            }  # fmt: skip
            found.append(rows.row(about, [COMPARED], partial(balance, view, name, seed)))
        for name, (own, mixture, method) in CASES.items():
            about = {
                "system": "moequant", "setting": name, "control": name not in OURS, "model": "reference", "seed": seed,
            }  # fmt: skip
            make = partial(measured, view, own, mixture, method, seed, scores)
            found.append(rows.row(about, [WIDTH, SAMPLES, WINDOWS, own, mixture, method], make))
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), (0,))
