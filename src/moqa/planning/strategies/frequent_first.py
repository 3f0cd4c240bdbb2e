"""`frequent-first`: two bits more for the experts that the router picks most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.placement import high_first
from moqa.planning.registry import ALWAYS_USED, strategy
from moqa.planning.strategies.frequency import share

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("frequent-first", needs_sensitivity=False, needs_budget=True, needs_experts=True, is_control=True,
          floor=ALWAYS_USED)  # fmt: skip
def frequent_first(problem: Problem) -> Choice:
    """Two bits more for the experts that get most tokens: the first of every layer, then the second, and so on.

    QuantMoE-Bench (arXiv 2406.08155), the placement by frequency.
    """
    experts = problem.routed_experts()
    picked = {
        layer: np.mean([share(problem, name, layer) for name in problem.known], axis=0)
        for layer in {layer for layer, _ in experts}
    }
    rank = {layer: np.argsort(np.argsort(-shares, kind="stable")) for layer, shares in picked.items()}
    order = sorted(experts, key=lambda key: (rank[key[0]][key[1]], -picked[key[0]][key[1]]))
    return high_first(problem, [experts[key] for key in order])
