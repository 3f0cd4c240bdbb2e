"""`frequency`: bits by how often the router picks an expert, the usual heuristic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import ALWAYS_USED, strategy
from moqa.planning.solver import Solution, solve

if TYPE_CHECKING:
    from moqa.planning.problem import Problem


@strategy("frequency", needs_budget=True, needs_experts=True, floor=ALWAYS_USED)
def frequency(problem: Problem) -> Solution:
    """Least rounding error, weighted by how often the router picks each expert on the known distributions.

    The rule of QuantMoE-Bench (arXiv 2406.08155) in the knapsack form of MC-MoE (arXiv 2410.06270). Units that every
    token passes through have a weight of 1.
    """
    picked = np.ones(len(problem.profile.record.units))
    for row, unit in enumerate(problem.profile.record.units):
        if unit.role == "expert":
            picked[row] = np.mean([share(problem, name, unit.layer)[unit.expert] for name in problem.known])
    weights = np.array([unit.weights for unit in problem.profile.record.units], float)
    errors = problem.profile.weights["rounding"].double().numpy() * (picked * weights)[:, None]
    return solve(problem.masked(problem.table(errors))[None], problem.sizes, problem.needed_limit)


def share(problem: Problem, name: str, layer: int) -> np.ndarray:
    """[experts] share of a distribution's tokens that the router of a layer sends to each expert."""
    tokens = problem.profile.layer(name, layer, "tokens").double().numpy()
    return tokens / problem.profile.record.distributions[name].tokens
