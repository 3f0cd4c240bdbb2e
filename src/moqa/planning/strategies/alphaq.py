"""`alphaq`: a knapsack over the spectra of the weights, without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import ALWAYS_USED, strategy
from moqa.planning.solver import Solution, solve

if TYPE_CHECKING:
    from moqa.planning.problem import Problem

# exponent of the sensitivity
SHAPE = 1.0


@strategy("alphaq", needs_sensitivity=False, needs_budget=True, is_control=True, floor=ALWAYS_USED,
          measures=("spectrum",))  # fmt: skip
def alphaq(problem: Problem) -> Solution:
    """Least sum of variance x 4^-bits over the weights, more for matrices with heavy spectral tails; needs no data.

    The sensitivity of a matrix is the median exponent of all tails over its own. Its released code counts matrices,
    which are equal there; ours counts weights.

    AlphaQ (arXiv 2606.04980); the form of its objective is that of its released code.
    """
    profile = problem.profile
    exponent, variance = profile.weights["spectrum"].double().numpy().T
    weights = np.array([unit.weights for unit in profile.record.units], float)
    sensitivity = (np.median(exponent) / np.maximum(exponent, 1e-8)) ** SHAPE * variance * weights
    errors = sensitivity[:, None] * 4.0 ** -np.array(profile.record.widths, float)
    return solve(problem.masked(problem.table(errors))[None], problem.sizes, problem.needed_limit)
