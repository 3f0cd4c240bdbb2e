"""`moqa-budget`: least expected divergence for the bytes, exactly, hedged against texts that are not known."""

import numpy as np

from moqa.errors import MoqaError
from moqa.plan.problem import SELF, Choice, Problem, strategy
from moqa.plan.solver import solve

DEFAULT_HEDGE = 0.5


@strategy("moqa-budget", hedge=DEFAULT_HEDGE)
def budgeted(problem: Problem) -> Choice:
    """Knapsack over the measured sensitivity of every unit and width.

    A unit's sensitivity on a distribution holds both how much of the data reaches it (its significance) and what a
    rounding error does to the output there, in nats of KL divergence per token; sums over units predict a plan's
    divergence. The hedge is the share of the model's own text in every objective: it stands in for all that the model
    can be asked, where the known texts are silent.
    """
    limit = problem.needed_limit("moqa-budget")
    hedge = problem.options.hedge or 0.0
    known = np.stack([problem.errors(name) for name in problem.known])
    if problem.options.objective == "minimax":
        # distributions differ in how much any plan costs them: compare each with what the uniform plan does to it
        uniform = problem.at_width(min(problem.widths, key=lambda w: abs(problem.bytes(problem.at_width(w)) - limit)))
        known = known / known[:, np.arange(len(uniform)), uniform].sum(1)[:, None, None]
    else:
        known = known.mean(0, keepdims=True)
    if hedge:
        own = problem.errors(SELF)
        scale = _spread(known, problem) / _spread(own[None], problem)
        known = (1 - hedge) * known + hedge * scale * own
    return solve(problem.masked(known), problem.sizes, limit)


def _spread(errors: np.ndarray, problem: Problem) -> float:
    """Size of an objective, so that a hedge is a share whatever its unit is: its mean sum at the narrowest widths."""
    smallest = problem.smallest()
    return float(errors[:, np.arange(len(smallest)), smallest].sum(1).mean())


def check_hedge(hedge: float, own_text: bool) -> None:
    """Refuse a hedge that the profile cannot give.

    Raises:
        MoqaError: if the profile holds none of the model's own text.
    """
    if hedge and not own_text:
        raise MoqaError(
            f"--hedge {hedge:g} needs the model's own text, the profile was made with --self-samples 0",
            "profile again without that option, or plan with --hedge 0",
        )
