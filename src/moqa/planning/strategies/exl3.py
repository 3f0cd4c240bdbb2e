"""`exl3`: a knapsack over the divergence that is measured with one part of a block rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import strategy
from moqa.planning.solver import solve

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("exl3", needs_sensitivity=False, needs_budget=True, is_control=True, measures=("divergence",))
def exl3(problem: Problem) -> Choice:
    """Least sum of the divergences that are measured with the attention, or a projection of all experts, rounded.

    All units of such a part of a block get one width; bytes that no part can use go to single units.

    ExLlamaV3's optimizer of layers, with a knapsack for its greedy choice.
    """
    # reads profiles with torch, which the help of a command does not wait for
    from moqa.profiling.swapped import swapped_part

    tables = [problem.profile.statistics[name]["divergence"].double().numpy() for name in problem.known]
    errors = problem.table(np.mean(tables, axis=0))
    parts: dict[tuple, list[int]] = {}
    for index, group in enumerate(problem.groups):
        unit = group.units[0]
        part = swapped_part(unit.role, unit.projection)
        # units with other allowed widths, such as those that the user has fixed, are parts of their own
        parts.setdefault((unit.layer, part, tuple(problem.allowed[index])), []).append(index)
    together = list(parts.values())
    sizes = np.stack([problem.sizes[rows].sum(0) for rows in together])
    costs = np.stack([np.where(problem.allowed[rows[0]], errors[rows].sum(0), np.inf) for rows in together])
    found = solve(costs[None], sizes, problem.needed_limit)
    choice = np.zeros(len(problem.groups), np.int64)
    for rows, picked in zip(together, found.choice, strict=True):
        choice[rows] = picked
    return problem.fill(choice, np.argsort(-errors[np.arange(len(choice)), choice], kind="stable").tolist())
