"""MoQE (2023) on the reference model: experts, attention or the embedding alone at 8 to 2 bits, and a rescue."""

import sys
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import moqa
from moqa.format.reader import open_checkpoint
from moqa.format.scheme import Scheme
from moqa.methods.grid import fit_grid
from moqa.models.view import ModelView, open_model
from moqa.profiling import Profile
from moqa.quantization import quantize
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder
from moqa.training import recover

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from related_rows import Rows, Scores

RUNS = ROOT / "runs" / "related"
WIDTHS, WINDOWS, STEPS = (8, 4, 3, 2), 4, 40
# what stays in 16 bits while a component is rounded
KEPT = {"experts": "*.self_attn.*", "attention": "*.experts.*"}


@cache
def profile_of(view: ModelView, seed: int) -> Profile:
    """Made when the first row needs it."""
    return moqa.profile(
        MODEL, texts("calib", KNOWN), RUNS / f"drawn-{seed}", seed=seed, samples=16, sensitivity=False, view=view
    )


def checkpoint(view: ModelView, profile: Profile, component: str, width: int, out: Path) -> moqa.Plan:
    """Write the model with one component rounded to nearest, all else in 16 bits."""
    plan = moqa.plan(profile, None, strategy="uniform", widths=[width], fixed={KEPT[component]: 16})
    quantize(MODEL, plan, out, profile=profile, view=view, method="rtn")
    return plan


def rounded(view: ModelView, seed: int, component: str, width: int, steps: int, scores: Scores) -> dict[str, Any]:
    profile = profile_of(view, seed)
    with temporary_folder() as folder:
        plan = checkpoint(view, profile, component, width, folder / "out")
        out = folder / "out"
        if steps:
            recover(out, folder / "better", length=str(steps), profile=profile, model=MODEL)
            out = folder / "better"
        found = scores.of(load_packed(open_checkpoint(out), kernels="reference"))
    return found | {
        "bits_per_weight": plan.account.model_bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None,
        "windows": WINDOWS, "steps": steps,
        "weights": sum(u.weights for u in profile.record.units if (u.role == "expert") == (component == "experts")),
    }  # fmt: skip


def embedding(view: ModelView, seed: int, width: int, scores: Scores) -> dict[str, Any]:
    """The embedding, which is the head, too; moqa keeps it in 16 bits, so it is rounded in memory."""
    table = view.model.get_input_embeddings().weight
    scheme, before = Scheme(width=width), table.detach().clone()
    plan = moqa.plan(profile_of(view, seed), None, strategy="uniform", widths=[16])
    with torch.no_grad():
        result = fit_grid(before, scheme)
        table.copy_(result.grid.decode(result.integers))
        found = scores.of(view.model)
        table.copy_(before)
    size = plan.account.checkpoint - before.numel() * 2 + scheme.stored_bytes(tuple(before.shape))
    weights = plan.account.weights + plan.account.kept_weights
    return found | {
        "bits_per_weight": size * 8 / weights, "bytes": size, "accuracy": None, "weights": before.numel(),
        "windows": WINDOWS, "steps": 0,
    }  # fmt: skip


def study(rows: Rows, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """A row per component and width."""
    view, found = open_model(MODEL), []
    scores = Scores(MODEL, texts("test", (*KNOWN, *NOVEL)), 256, WINDOWS, KNOWN)
    for seed in seeds:
        for component in ("experts", "attention", "embedding"):
            for width in WIDTHS:
                about = {
                    "system": "moqe-2023", "setting": f"{component} at {width} bits", "control": component != "experts",
                    "model": "reference", "seed": seed,
                }  # fmt: skip
                make = (
                    partial(embedding, view, seed, width, scores) if component == "embedding"
                    else partial(rounded, view, seed, component, width, 0, scores)
                )  # fmt: skip
                found.append(rows.row(about, [WINDOWS], make))
        about = {
            "system": "moqe-2023", "setting": f"experts at 2 bits, trained for {STEPS} steps", "control": False,
            "model": "reference", "seed": seed,
        }  # fmt: skip
        found.append(rows.row(about, [WINDOWS], partial(rounded, view, seed, "experts", 2, STEPS, scores)))
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), (0,))
