"""`auto`: the plan of `budget` where the samples tell that it is better than a uniform one, else the uniform one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import OPTIMUM, PLAIN, strategy
from moqa.planning.solver import Solution
from moqa.planning.strategies.budget import budgeted, default_hedge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moqa.planning.problem import Choice, Problem


@strategy("auto", needs_budget=True, hedge=default_hedge, options=("objective",), mixes=True)
def auto(problem: Problem) -> Solution:
    """The plan of budget, or one scheme for all units where the samples do not tell that it does better.

    The two are compared by their expected divergence on all known distributions together: the plan of `budget` is taken
    if the lower end of its gain's interval, which the jackknife over folds of the samples gives, is above zero.
    """
    # reads profiles with torch, which the help of a command does not wait for
    from moqa.planning.expected import jackknifed, total_errors, used_folds

    found, plain = budgeted(problem), best_uniform(problem)
    assert isinstance(found, Solution)
    ours, theirs = problem.units(found.choice), problem.units(plain)

    def share(tables: NDArray) -> NDArray:
        least = total_errors(problem.profile, tables, theirs)
        return 1 - total_errors(problem.profile, tables, ours) / np.maximum(least, 1e-300)

    gain = jackknifed([used_folds(problem.profile, name) for name in problem.known], share)
    if (gain.share if gain.low is None else gain.low) > 0:
        return replace(found, by=OPTIMUM)
    return Solution(plain, gap=None, by=PLAIN)


def best_uniform(problem: Problem) -> Choice:
    """The scheme for all units that is expected to cost least within the budget; where it is not allowed, a wider."""
    errors = np.sum([problem.errors(name) for name in problem.known], axis=0)
    rows = np.arange(len(errors))
    choices = [
        np.where(problem.allowed[:, column], column, problem.at_width(width))
        for column, width in enumerate(problem.widths)
    ]
    fitting = [choice for choice in choices if problem.fits(choice)]
    return min(fitting, key=lambda choice: float(errors[rows, choice].sum()), default=problem.smallest())
