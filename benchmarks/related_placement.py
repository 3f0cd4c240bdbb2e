"""QuantMoE-Bench's question on the reference model: all strategies at four budgets, on known and novel text."""

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

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
from related_rows import Rows, Scores, content, say

RUNS = ROOT / "runs" / "related"
# where the bits go, and nothing else: one encoding and one group size for all
PLACEMENT: dict[str, Any] = {"encodings": ("int",), "groups": (64,)}


class Subject(NamedTuple):
    """A model that is quantized, on how many windows of a text it is fitted and measured, and at which sizes."""

    name: str
    folder: Path
    samples: int
    windows: int
    sizes: tuple[tuple[float, ...], ...]  # what decides most is measured first, with all seeds


REFERENCE = Subject("reference", MODEL, 64, 8, ((2.5, 3.0), (2.1, 3.5)))


def profile_of(subject: Subject, seed: int, view: ModelView) -> Profile:
    """Samples of every seed are others; with what strategies need besides."""
    out = RUNS / (f"profile-{seed}" if subject is REFERENCE else f"profile-{subject.name}-{seed}")
    found = moqa.profile(subject.folder, texts("calib", KNOWN), out, samples=subject.samples, seed=seed, view=view)
    further = {name for member in of_model(view) for name in STRATEGIES[member].measures}
    return with_further(found, sorted(further), KNOWN, "the study")


def of_model(view: ModelView) -> list[str]:
    """Strategies that a model can have."""
    return [name for name, member in STRATEGIES.items() if view.has_experts or not member.needs_experts]


def measured(subject: Subject, plan: Plan, profile: Profile, view: ModelView, scores: Scores) -> dict[str, Any]:
    """What a plan's checkpoint is, from its files."""
    with temporary_folder() as folder:
        quantize(subject.folder, plan, folder / "out", profile=profile, view=view)
        found = scores.of(load_packed(open_checkpoint(folder / "out"), kernels="reference"))
    return found | {"bits_per_weight": plan.account.bits_per_weight, "bytes": plan.account.checkpoint, "accuracy": None}


def plans(profile: Profile, names: Sequence[str], bits: float, seed: int) -> dict[str, Plan]:
    """A plan of every strategy that has one of so few bits, and the default with all encodings."""
    found: dict[str, Plan] = {}
    for name in names:
        try:
            found[name] = moqa.plan(profile, f"{bits}bpw", strategy=name, seed=seed, **PLACEMENT)
        except MoqaError as error:
            say(f"{name} at {bits}: {error}")
    return found | {"budget, all encodings": moqa.plan(profile, f"{bits}bpw", strategy="budget", seed=seed)}


def compare(rows: Rows, subject: Subject, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row per strategy, budget and seed; strategies that make the same plan share what was measured."""
    view, found = open_model(subject.folder), []
    scores = Scores(subject.folder, texts("test", (*KNOWN, *NOVEL)), 256, subject.windows, KNOWN)
    profiles: dict[int, Profile] = {}
    same: dict[str, dict[str, Any]] = {}
    for sizes, seed in product(subject.sizes, seeds):
        if seed not in profiles:
            profiles[seed] = profile_of(subject, seed, view)
        profile = profiles[seed]
        for bits in sizes:
            for name, plan in plans(profile, of_model(view), bits, seed).items():
                about = {
                    "system": "quantmoe-bench", "setting": f"{name} at {bits:g}", "strategy": name, "budget": bits,
                    "control": name in ("uniform", "random"), "model": subject.name, "seed": seed,
                }  # fmt: skip
                schemes = {unit: scheme.model_dump() for unit, scheme in plan.units.items()}
                depends = [schemes, plan.mixture, plan.samples, subject.windows]
                key = content(*depends)
                known = same.get(key)
                make = partial(dict, known) if known else partial(measured, subject, plan, profile, view, scores)
                row = rows.row(about, depends, make)
                same[key] = {name: value for name, value in row.items() if name not in about}
                found.append(row)
    return found


def study(rows: Rows, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The reference model, all seeds."""
    return compare(rows, REFERENCE, seeds)


if __name__ == "__main__":
    study(Rows(RUNS / "rows"), tuple(int(seed) for seed in sys.argv[1:] or ["0"]))
