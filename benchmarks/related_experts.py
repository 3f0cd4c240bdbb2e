"""UNCURL on the reference model: fewer experts for one text, beside frequency, chance, and fewer bits."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import moqa
from moqa.format.reader import open_checkpoint
from moqa.models.view import open_model
from moqa.profiling import Profile
from moqa.quantization import quantize
from moqa.reduction import reduce
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from related_rows import Rows, Scores

RUNS = ROOT / "runs" / "related"
TASK = ("wiki",)
OTHERS = tuple(name for name in (*KNOWN, *NOVEL) if name not in TASK)
COUNTS, WINDOWS = (12, 8), 8
BITS = 4.3  # of the reduced models, when they are quantized: uniform 4 bits


def reduced(by: str, count: int, seed: int) -> Path:
    """A reduced model; made once."""
    out = RUNS / "reduced" / f"{by}-{count}-{seed}"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        reduce(MODEL, count, texts("calib", TASK), out, by=by, seed=seed)
    return out


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plain(by: str, count: int, seed: int, scores: Scores) -> dict[str, Any]:
    """The reduced model as it is."""
    out = reduced(by, count, seed)
    return scores.of(open_model(out).model) | {"bits_per_weight": 16.0, "bytes": weights_of(out), "accuracy": None}


def profiled(model: Path, seed: int) -> Profile:
    out = RUNS / "reduced" / f"{model.name}-profile-{seed}"
    return moqa.profile(model, texts("calib", TASK), out, seed=seed)


def quantized(model: Path, budget: str, seed: int, scores: Scores) -> dict[str, Any]:
    """A model quantized for the task within a budget by the default strategy."""
    profile = profiled(model, seed)
    plan = moqa.plan(profile, budget)
    with temporary_folder() as folder:
        quantize(model, plan, folder / "out", profile=profile)
        found = scores.of(load_packed(open_checkpoint(folder / "out"), kernels="reference"))
    return found | {"bits_per_weight": plan.account.bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None}


def small(by: str, count: int, seed: int, scores: Scores) -> dict[str, Any]:
    """The reduced model in few bits."""
    return quantized(reduced(by, count, seed), f"{BITS}bpw", seed, scores)


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of reduced models in 16 bits, of reduced and whole models at the same bytes."""
    scores = Scores(MODEL, texts("test", (*TASK, *OTHERS)), 256, WINDOWS, TASK)
    found = []
    for seed in seeds:
        for count in COUNTS:
            for by in ("uncurl", "frequency", "random"):
                about = {
                    "system": "uncurl", "setting": f"{count} experts by {by}", "control": by != "uncurl",
                    "model": "reference", "seed": seed,
                }  # fmt: skip
                found.append(rows.row(about, [WINDOWS, TASK], partial(plain, by, count, seed, scores)))
            for by in ("uncurl", "frequency"):
                about = {
                    "system": "uncurl", "setting": f"{count} experts by {by}, {BITS:g} bits", "control": by != "uncurl",
                    "model": "reference", "seed": seed,
                }  # fmt: skip
                make = partial(small, by, count, seed, scores)
                found.append(rows.row(about, [WINDOWS, TASK], make))
            size = max(row["bytes"] for row in found[-2:])
            about = {
                "system": "uncurl", "setting": f"16 experts, the bytes of {count} at {BITS:g} bits", "control": True,
                "model": "reference", "seed": seed,
            }  # fmt: skip
            found.append(rows.row(about, [WINDOWS, TASK, size], partial(quantized, MODEL, f"{size}B", seed, scores)))
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), (0,))
