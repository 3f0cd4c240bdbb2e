"""`mc-moe`: a knapsack over how often, how strongly and at what loss an expert is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import ALWAYS_USED, strategy
from moqa.planning.solver import Solution, solve
from moqa.planning.strategies.frequency import share

if TYPE_CHECKING:
    from moqa.planning.problem import Problem

# exponents of the frequency, of the gate's weight and of the loss
FREQUENCY, GATE, LOSS = 1.0, 1.5, 2.0


@strategy("mc-moe", needs_sensitivity=False, needs_budget=True, needs_experts=True, is_control=True, floor=ALWAYS_USED)
def mc_moe(problem: Problem) -> Solution:
    """Least sum of frequency x gate weight^1.5 x loss^2 over the experts.

    The gate weight of an expert is the mean over all tokens. The loss is the Frobenius norm of its rounding error,
    where the paper measures that of its output; units that every token uses have a frequency and a gate weight of 1.
    The paper solves layer by layer with 1 to 3 bits, ours is one problem with all widths.

    MC-MoE (arXiv 2410.06270), the objective of its integer program, with the exponents of its paper.
    """
    profile = problem.profile
    picked = np.ones(len(profile.record.units))
    for row, unit in enumerate(profile.record.units):
        if unit.role == "expert":
            frequency, gate = (
                np.mean([of(problem, name, unit.layer)[unit.expert] for name in problem.known]) for of in (share, _gate)
            )
            picked[row] = frequency**FREQUENCY * gate**GATE
    weights = np.array([unit.weights for unit in profile.record.units], float)[:, None]
    loss = np.sqrt(profile.weights["rounding"].double().numpy() * weights)
    return solve(problem.masked(problem.table(picked[:, None] * loss**LOSS))[None], problem.sizes, problem.needed_limit)


def _gate(problem: Problem, name: str, layer: int) -> np.ndarray:
    """[experts] mean weight that the router of a layer gives to each expert, over all tokens of a distribution."""
    mass = problem.profile.layer(name, layer, "gate_mass").double().numpy()
    return mass / problem.profile.record.distributions[name].tokens
