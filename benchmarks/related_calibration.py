"""MoEQuant on the reference model: text that is balanced over the experts, and gate-weighted Gram matrices."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import moqa
from moqa.format.reader import open_checkpoint
from moqa.models.view import ModelView, open_model
from moqa.planning import Plan
from moqa.profiling import SELF, Profile
from moqa.profiling.balanced import expert_counts
from moqa.quantization import quantize
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from related_rows import Rows, Scores

RUNS = ROOT / "runs" / "related"
WIDTH, SAMPLES, WINDOWS = 3, 16, 4
TEXT = {name: 1 / len(KNOWN) for name in KNOWN}
# the text that units are quantized on, and the method
CASES = {
    "plain text": ("drawn", TEXT, "gptq"), "balanced own text": ("balanced", {SELF: 1.0}, "gptq"),
    "drawn own text": ("drawn", {SELF: 1.0}, "gptq"), "plain text, gates off": ("drawn", TEXT, "gptq-plain"),
    "plain text, gates on": ("drawn", TEXT, "gptq-affinity"),
}  # fmt: skip

OURS = ("balanced own text", "plain text, gates on")  # the paper's; all others are there to compare


def spread(view: ModelView, profile: Profile, mixture: dict[str, float]) -> float:
    """Standard deviation of the shares of the experts of a block, mean over blocks."""
    counts = sum(expert_counts(view, profile.samples(name)) for name in mixture)
    shares = counts / counts.sum(1, keepdim=True)  # type: ignore[union-attr]
    return float(shares.std(dim=1, correction=0).mean())


def measured(
    view: ModelView, profile: Profile, mixture: dict[str, float], method: str, scores: Scores
) -> dict[str, Any]:
    plan: Plan = moqa.plan(profile, None, strategy="uniform", widths=[WIDTH])
    plan = plan.model_copy(update={"mixture": mixture, "samples": profile.digest(mixture)})
    with temporary_folder() as folder:
        quantize(MODEL, plan, folder / "out", profile=profile, view=view, method=method)
        found = scores.of(load_packed(open_checkpoint(folder / "out"), kernels="reference"))
    return found | {
        "bits_per_weight": plan.account.bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None,
        "balance": spread(view, profile, mixture), "samples": SAMPLES, "windows": WINDOWS,
    }  # fmt: skip


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per text and method, uniform 3 bits."""
    view, found = open_model(MODEL), []
    scores = Scores(view, texts("test", (*KNOWN, *NOVEL)), 256, WINDOWS, KNOWN)
    for seed in seeds:
        for name, (own, mixture, method) in CASES.items():
            profile = moqa.profile(
                MODEL, texts("calib", KNOWN), RUNS / f"{own}-{seed}", seed=seed, samples=SAMPLES, own_text=own,
                sensitivity=False, view=view,
            )  # fmt: skip
            about = {
                "system": "moequant", "setting": name, "control": name not in OURS, "model": "reference", "seed": seed,
            }  # fmt: skip
            make = partial(measured, view, profile, mixture, method, scores)
            found.append(rows.row(about, [WIDTH, SAMPLES, WINDOWS, profile.digest(mixture)], make))
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), (0,))
