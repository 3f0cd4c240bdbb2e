"""`budget`: least expected divergence within a budget, solved exactly and hedged against novel texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import strategy
from moqa.planning.solver import Solution, solve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moqa.planning.problem import Choice, Problem

DEFAULT_HEDGE = 0.3
# below 3 stored bits of a weight, what is fitted to known texts costs other texts more
LOW_BITS, LOW_HEDGE = 3.0, 0.5


def default_hedge(bits: float | None) -> float:
    """Share of the model's own text for a budget in stored bits per weight.

    >>> default_hedge(2.5), default_hedge(4.0)
    (0.5, 0.3)
    """
    return LOW_HEDGE if bits is not None and bits < LOW_BITS else DEFAULT_HEDGE


@strategy("budget", needs_budget=True, hedge=default_hedge, options=("objective",), mixes=True)
def budgeted(problem: Problem) -> Solution:
    """Knapsack over the measured sensitivity of every unit and width.

    The sensitivity of a unit on a distribution includes how much of the data reaches it (its significance) and how much
    a rounding error changes the output there, in nats of KL divergence per token; the sum over all units predicts the
    divergence of a plan. The hedge is the share of the model's own text in every objective: it represents inputs that
    the known texts do not cover.
    """
    limit, hedge = problem.needed_limit, problem.options.hedge or 0.0
    known = np.stack([problem.errors(name) for name in problem.known])
    if problem.options.objective == "minimax":
        # distributions differ in how much any plan costs them: measure each relative to its cost under the uniform plan
        uniform = problem.at_width(min(problem.widths, key=lambda w: abs(problem.bytes(problem.at_width(w)) - limit)))
        # (a uniform plan of 16 bits costs nothing: then relative to the narrowest widths)
        cost, narrowest = _sums(known, uniform), _sums(known, problem.smallest())
        cost = np.where(cost > 0, cost, np.where(narrowest > 0, narrowest, 1.0))
        known = known / cost[:, None, None]
    else:
        known = known.mean(0, keepdims=True)
    if hedge:
        own = problem.own_errors()
        # the hedge is a share in any unit of the objective: both parts are scaled by their cost at the narrowest widths
        cost, own_cost = (_sums(errors, problem.smallest()).mean() for errors in (known, own[None]))
        scale = cost / own_cost if own_cost else 0.0
        known = (1 - hedge) * known + hedge * scale * own
    return solve(problem.masked(known), problem.sizes, limit)


def _sums(errors: NDArray[np.float64], choice: Choice) -> NDArray[np.float64]:
    """[objectives] summed error of a choice."""
    return errors[:, np.arange(len(choice)), choice].sum(1)
