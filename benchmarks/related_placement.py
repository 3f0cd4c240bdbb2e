"""QuantMoE-Bench's question on the reference model: all strategies at four budgets, on known and novel text."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import moqa
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.models.view import ModelView, open_model
from moqa.planning import STRATEGIES, Plan
from moqa.profiling import Profile
from moqa.profiling.further import with_further
from moqa.quantization import quantize
from moqa.runtime.load import load_packed
from moqa.storage.temporary import temporary_folder

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from related_rows import Rows, Scores, say

RUNS = ROOT / "runs" / "related"
BITS = (2.5, 3.0, 2.1, 3.5)
WINDOWS = 8
# where the bits go, and nothing else: one encoding and one group size for all
PLACEMENT: dict[str, Any] = {"encodings": ("int",), "groups": (64,)}


def profile_of(seed: int, view: ModelView) -> Profile:
    """Samples of every seed are others."""
    return moqa.profile(MODEL, texts("calib", KNOWN), RUNS / f"profile-{seed}", seed=seed, view=view)


def measured(plan: Plan, profile: Profile, view: ModelView, scores: Scores) -> dict[str, Any]:
    """What a plan's checkpoint is, from its files."""
    with temporary_folder() as folder:
        quantize(MODEL, plan, folder / "out", profile=profile, view=view)
        found = scores.of(load_packed(open_checkpoint(folder / "out"), kernels="reference"))
    return found | {"bits_per_weight": plan.account.bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None}


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per strategy, budget and seed."""
    view, found = open_model(MODEL), []
    scores = Scores(view, texts("test", (*KNOWN, *NOVEL)), 256, WINDOWS, KNOWN)
    further = sorted({name for member in STRATEGIES.values() for name in member.measures})
    for seed in seeds:
        profile = with_further(profile_of(seed, view), further, KNOWN, "the study")
        for bits in BITS:
            made: dict[str, Plan] = {}
            for name in STRATEGIES:
                try:
                    made[name] = moqa.plan(profile, f"{bits}bpw", strategy=name, seed=seed, **PLACEMENT)
                except MoqaError as error:
                    say(f"{name} at {bits}: {error}")
            made["budget, all encodings"] = moqa.plan(profile, f"{bits}bpw", strategy="budget", seed=seed)
            for name, plan in made.items():
                about = {
                    "system": "quantmoe-bench", "setting": f"{name} at {bits:g}", "strategy": name, "budget": bits,
                    "control": name in ("uniform", "random"), "model": "reference", "seed": seed,
                }  # fmt: skip
                schemes = {unit: scheme.model_dump() for unit, scheme in plan.units.items()}
                make = partial(measured, plan, profile, view, scores)
                found.append(rows.row(about, [schemes, plan.mixture, plan.samples, WINDOWS], make))
    return found


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), tuple(int(seed) for seed in sys.argv[1:] or ["0"]))
