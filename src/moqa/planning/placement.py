"""Two widths and an order: what hand rules have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moqa.planning.problem import Choice, Problem

# bits between the two widths of the rules of QuantMoE-Bench: 2 and 4
APART = 2
# a uniform plan that leaves less of the budget than this leaves too little for any wider unit
_NEARLY_ALL = 0.98


def high_first(problem: Problem, items: Sequence[list[int]]) -> Choice:
    """Two bits more for the first items than for the rest, for as many as the budget allows.

    >>> high_first(problem, [[index] for index in range(len(problem.groups))])  # doctest: +SKIP
    array([3, 3, 3, 1, 1, 1])

    Args:
        problem: with a budget.
        items: rows of groups that are widened together, the most important first.
    """
    low, _ = neighbours(problem)
    wider = problem.widths[int(low.min())] + APART
    return filled(problem, raised(problem, low, problem.at_width(wider), items), items)


def raised(problem: Problem, low: Choice, high: Choice, items: Sequence[list[int]]) -> Choice:
    """`low`, but `high` for the first items, up to the one that the budget no longer allows."""
    choice = low.copy()
    for rows in items:
        wider = choice.copy()
        wider[rows] = high[rows]
        if not problem.fits(wider):
            break
        choice = wider
    return choice


def filled(problem: Problem, choice: Choice, items: Sequence[list[int]]) -> Choice:
    """Spend the bytes that are left on the items in their order, then on all other groups."""
    choice = problem.fill(choice, [row for rows in items for row in rows])
    return problem.fill(choice, range(len(problem.groups)))


def neighbours(problem: Problem) -> tuple[Choice, Choice]:
    """Uniform plans below and above the budget; if one nearly equals the budget, its two neighbours."""
    plans = [problem.at_width(width) for width in problem.widths]
    limit = problem.needed_limit
    above = next((i for i, plan in enumerate(plans) if problem.bytes(plan) > limit), len(plans) - 1)
    below = max(above - 1, 0)
    if below > 0 and problem.bytes(plans[below]) > _NEARLY_ALL * limit:
        below -= 1
    return plans[below], plans[above]


def by_score(problem: Problem, score: Callable[[int], float]) -> list[list[int]]:
    """All groups, those with the highest score of a unit first.

    Args:
        problem: the groups.
        score: of a row of the profile's tables.
    """
    scores = [max(score(row) for row in group.members) for group in problem.groups]
    return [[int(index)] for index in np.argsort([-value for value in scores], kind="stable")]
