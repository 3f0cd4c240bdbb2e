"""Multiple-choice knapsack: one width per group, least error, bytes within the budget. Exact, by HiGHS."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, hstack

# HiGHS stops when no better plan than this can exist, relative to the plan's error; far below what a profile can tell.
_GAP = 1e-7


def solve(costs: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Choice per group that minimises the largest of several summed errors within a byte limit.

    >>> solve(np.array([[[9.0, 1.0], [4.0, 3.0]]]), np.array([[2, 4], [2, 4]]), limit=6)
    array([1, 0])

    Args:
        costs: [objectives, groups, choices] error of each choice, float64; infinite where a choice is not allowed.
            One objective is the plain knapsack; with several, the largest sum counts and their mean breaks ties.
        sizes: [groups, choices] bytes of each choice.
        limit: bytes that the plan may take.

    Returns:
        [groups] index of the chosen width, int64.

    Raises:
        ValueError: if even the smallest choices exceed the limit.
    """
    objectives, groups, choices = costs.shape
    allowed = np.isfinite(costs).all(0)
    group, choice = np.nonzero(allowed & ~_dominated(costs, sizes, allowed))
    if np.where(allowed, sizes, np.iinfo(np.int64).max).min(1).sum() > limit:
        raise ValueError(f"the smallest choices exceed {limit} bytes")
    error = costs[:, group, choice]
    error = error / max(error.max(1).sum() / objectives, 1e-300)
    columns = np.arange(len(group))
    one_each = csr_array(coo_array((np.ones(len(group)), (group, columns)), shape=(groups, len(group))))
    size = sizes[group, choice].astype(float)
    constraints = [LinearConstraint(_wide(one_each), 1, 1), LinearConstraint(_wide(size[None] / limit), 0, 1)]
    worst = csr_array(np.concatenate([error, -np.ones((objectives, 1))], axis=1))
    constraints.append(LinearConstraint(worst, -np.inf, 0))
    objective = np.append(error.mean(0) * 1e-3, 1.0)
    result = milp(
        objective,
        integrality=np.append(np.ones(len(group)), 0),
        bounds=Bounds(0, np.append(np.ones(len(group)), np.inf)),
        constraints=constraints,
        options={"mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise RuntimeError(f"HiGHS: {result.message}")
    picked = result.x[:-1] > 0.5
    best = np.zeros(groups, np.int64)
    best[group[picked]] = choice[picked]
    return best


def _wide(rows: NDArray | csr_array) -> csr_array:
    """Rows over the choices, with a zero column for the largest sum."""
    rows = csr_array(rows)
    return csr_array(hstack([rows, csr_array((rows.shape[0], 1))]))


def _dominated(costs: NDArray, sizes: NDArray, allowed: NDArray) -> NDArray[np.bool_]:
    """[groups, choices] whether another choice is no larger and no worse, and better in one of the two."""
    choices = sizes.shape[1]
    found = np.zeros_like(allowed)
    for this in range(choices):
        for other in range(choices):
            if this != other:
                no_worse = (costs[:, :, other] <= costs[:, :, this]).all(0) & (sizes[:, other] <= sizes[:, this])
                strict = (costs[:, :, other] < costs[:, :, this]).any(0) | (sizes[:, other] < sizes[:, this])
                found[:, this] |= allowed[:, other] & no_worse & (strict | (other < this))
    return found
