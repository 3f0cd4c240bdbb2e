"""What each part of the budgeted plan is worth, at the bytes of uniform 3 bits. Writes docs/results/ablations.md."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moqa
import moqa.methods.gptq
import moqa.profiling.passes
from moqa.evaluation.proof import ProofSetup
from moqa.methods import METHODS
from moqa.models.view import open_model
from moqa.planning import Plan
from moqa.planning.problem import Problem
from moqa.planning.registry import strategy
from moqa.planning.solver import Solution, solve
from moqa.profiling import SELF
from moqa.profiling.sensitivity import Sensitivity
from moqa.progress import quiet

sys.path.insert(0, str(Path(__file__).parent))
from demo import KNOWN, MODEL, NOVEL, ROOT, texts

WINDOWS = 16
HEDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Diagonal(Sensitivity):
    """The usual form: squared gradient x squared rounding error, weight by weight."""

    def add(self, name: str, x: Tensor, gradient: Tensor, samples: int | None = None) -> None:  # noqa: ARG002
        error = self.errors[name].float()
        self.sums[name][self.fold] += 0.5 * torch.einsum("oi,woi->w", gradient.square().T @ x.square(), error.square())


def hedged_by(problem: Problem, stand_in: np.ndarray, share: float) -> Solution:
    """Knapsack whose hedge is another [units, widths] table, scaled to the known one as the real hedge is."""
    known = np.mean([problem.errors(name) for name in problem.known], axis=0)
    other = problem.table(stand_in)
    rows, narrow = np.arange(len(known)), problem.smallest()
    other = other * known[rows, narrow].sum() / other[rows, narrow].sum()
    return solve(problem.masked((1 - share) * known + share * other)[None], problem.sizes, problem.limit or 0)


@strategy("hedged by weights", needs_budget=True, hedge=0.3)
def by_weights(problem: Problem) -> Solution:
    """Data-free: relative rounding error x number of weights."""
    weights = np.array([[unit.weights] for unit in problem.profile.record.units])
    error = problem.profile.weights["rounding"].double().numpy() * weights
    return hedged_by(problem, error, problem.options.hedge or 0.0)


@strategy("hedged by usage", needs_budget=True, hedge=0.3)
def by_usage(problem: Problem) -> Solution:
    """As if every expert of a layer were as sensitive as their mean."""
    known = np.mean([problem.profile.sensitivity(name).double().numpy() for name in problem.known], axis=0)
    kinds: dict[tuple, list[int]] = {}
    for row, unit in enumerate(problem.profile.record.units):
        kinds.setdefault((unit.layer, unit.role, unit.projection), []).append(row)
    for rows in kinds.values():
        known[rows] = known[rows].mean(0)
    return hedged_by(problem, known, problem.options.hedge or 0.0)


def with_own_text(plan: Plan, share: float) -> Plan:
    """The same plan, but calibrated on another share of the model's own text."""
    mixture = {name: (1 - share) / len(KNOWN) for name in KNOWN} | ({SELF: share} if share else {})
    return plan.model_copy(update={"mixture": mixture})


class Table:
    """Rows of mean known and novel KL, and their change against uniform."""

    def __init__(self, bench: ProofSetup) -> None:
        self._bench, self.lines, self._base = (
            bench,
            ["| row | known KL | novel KL | known | novel |", "|---|---:|---:|---:|---:|"],
            None,
        )

    def add(self, name: str, plan: Plan, method: str = "gptq") -> tuple[float, float]:
        found = self._bench.run(plan, method, quiet).distributions
        pair = tuple(sum(found[n].kl_divergence or 0 for n in names) / len(names) for names in (KNOWN, NOVEL))
        self._base = self._base or pair
        change = [f"{new / old - 1:+.0%}" for new, old in zip(pair, self._base, strict=True)]
        self.lines.append(f"| {name} | {pair[0]:.4f} | {pair[1]:.4f} | {change[0]} | {change[1]} |")
        print(self.lines[-1], flush=True)
        return pair[0], pair[1]


def starved(view: Any, held_out: list) -> str:
    """Uniform 3 bits calibrated on four windows, with and without the two rules that guard experts with few tokens."""
    profile = moqa.profile(MODEL, texts("calib", KNOWN), ROOT / "runs" / "ablations" / "starved", samples=4, view=view)
    bench = ProofSetup(str(MODEL), view, profile, held_out=held_out, windows=WINDOWS, report=quiet)
    plan = moqa.plan(profile, None, strategy="uniform", widths=[3])
    table = Table(bench)
    table.add("rtn", plan, "rtn")
    table.add("gptq", plan)
    solver: Any = moqa.methods.gptq
    grown, solver.damping = solver.damping, lambda *_: solver.DAMPING
    table.add("gptq, damping does not grow", plan)
    solver.damping = grown
    better = METHODS["rtn"]
    METHODS["rtn"] = METHODS["gptq"]
    table.add("gptq, even where rtn is better", plan)
    METHODS["rtn"] = better
    return "\n".join(table.lines)


def predictions(plans: dict[str, Plan], measured: dict[str, float]) -> str:
    """Predicted against measured known KL."""
    lines = ["| plan | predicted known KL | measured |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {np.mean([plan.predicted[n] for n in KNOWN]):.4f} | {measured[name]:.4f} |"
        for name, plan in plans.items()
    ]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(2)
    view = open_model(MODEL)
    data = texts("calib", KNOWN)
    profile = moqa.profile(MODEL, data, ROOT / "runs" / "ablations" / "profile", view=view)
    passes: Any = moqa.profiling.passes
    passes.Sensitivity = Diagonal
    diagonal = moqa.profile(MODEL, data, ROOT / "runs" / "ablations" / "diagonal", view=view)
    passes.Sensitivity = Sensitivity
    held_out = texts("test", (*KNOWN, *NOVEL))
    bench = ProofSetup(str(MODEL), view, profile, held_out=held_out, windows=WINDOWS, report=quiet)
    uniform = moqa.plan(profile, None, strategy="uniform", widths=[3])
    budget = f"{uniform.account.checkpoint}B"
    table, plans, measured = Table(bench), {"uniform": uniform}, {}
    measured["uniform"] = table.add("uniform", uniform)[0]
    table.add("uniform, calibrated with 40 % own text", with_own_text(uniform, 0.4))
    for hedge in HEDGES:
        name = f"budget, hedge {hedge:g}"
        plans[name] = moqa.plan(profile, budget, hedge=hedge)
        measured[name] = table.add(name, plans[name])[0]
    table.add(
        "budget, hedge 0.2, plan alone (calibrated on known text)",
        with_own_text(moqa.plan(profile, budget, hedge=0.2), 0.0),
    )
    table.add(
        "budget, hedge 0, calibrated with 40 % own text", with_own_text(moqa.plan(profile, budget, hedge=0.0), 0.4)
    )
    for name in ("hedged by weights", "hedged by usage"):
        for share in (0.1, 0.3, 1.0):
            table.add(f"{name}, {share:g}", with_own_text(moqa.plan(profile, budget, strategy=name, hedge=share), 0.4))
    table.add("diagonal sensitivity, hedge 0", moqa.plan(diagonal, budget, hedge=0.0))
    table.add("minimax over wiki and novels, hedge 0.1", moqa.plan(profile, budget, hedge=0.1, objective="minimax"))
    for ties in ("expert", "layer_projection", "layer"):
        table.add(f"ties {ties}, hedge 0.1", moqa.plan(profile, budget, ties=ties, hedge=0.1))
    text = f"""# What each part is worth

Command: `make results` (`benchmarks/ablations.py`): reference model, gptq, at most the bytes of uniform 3 bits
({uniform.account.checkpoint:,}), {WINDOWS} held-out windows of 256 tokens per text; known = wiki, novels; novel =
python, math, german, french; last columns against the first row.

{chr(10).join(table.lines)}

## Predicted and measured
A plan's sum of sensitivities against what is measured. The sum leaves out what errors do to each other and to the
routing, and is made on other text: it orders plans, and is about half of what is measured.

{predictions(plans, measured)}

## Experts with few tokens
Uniform 3 bits, calibrated on 4 windows per text: about {4 * 256 * 2 // 16} tokens per expert and text, for 256
features.

{starved(view, held_out)}
"""
    (ROOT / "docs" / "results" / "ablations.md").write_text(text)


if __name__ == "__main__":
    main()
