"""Multiple-choice knapsack: one width per group with the least error within the budget; solved exactly by HiGHS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# HiGHS stops when no plan can be better by more than this share of the error; profiles are far less precise than that.
_GAP = 1e-7
# HiGHS also stops at an absolute gap of 1e-6: errors are scaled up so that only the relative gap counts, even if a plan
# of wide widths has a millionth of the narrowest plan's error.
_SCALE = 1e6
# largest number of steps that sizes are divided into: first exact, then coarser and coarser
_PARTS = (2**62, 10**5, 10**4, 10**3)


def solve(costs: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Choose one option per group so that the largest of several summed errors is minimal within a byte limit.

    >>> solve(np.array([[[9.0, 1.0], [4.0, 3.0]]]), np.array([[2, 4], [2, 4]]), limit=6)
    array([1, 0])

    Args:
        costs: [objectives, groups, choices] error of each choice, float64; infinite where a choice is not allowed.
            One objective is the plain knapsack; with several, the largest sum is minimised and the mean breaks ties.
        sizes: [groups, choices] bytes of each choice.
        limit: bytes of all groups together.

    Returns:
        [groups] index of the chosen width, int64.

    Raises:
        ValueError: if the smallest choices exceed the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array

    objectives, groups, _ = costs.shape
    allowed = np.asarray(np.isfinite(costs).all(axis=0))
    group, choice = np.nonzero(allowed & ~_dominated(costs, sizes, allowed))
    least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(1)
    if not allowed.any(1).all() or least.sum() > limit:
        raise ValueError(f"the smallest choices exceed {limit} bytes")
    error = costs[:, group, choice]
    error = error * (_SCALE / max(error.max(1).sum() / objectives, 1e-300))
    columns = np.arange(len(group))
    one_each = csr_array(coo_array((np.ones(len(group)), (group, columns)), shape=(groups, len(group))))
    worst = csr_array(np.concatenate([error, -np.ones((objectives, 1))], axis=1))
    objective = np.append(error.mean(0) * 1e-3, 1.0)
    more, room = sizes[group, choice] - least[group], limit - int(least.sum())
    exact = max(int(np.gcd.reduce(more)), 1)
    for parts in _PARTS:
        # HiGHS accepts 0.999999 as 1. Sizes counted in steps above the smallest choices are usually small enough for
        # this to make no difference; if not, the next round uses coarser steps, rounded so that the limit still holds.
        step = max(exact, -(-int(more.max()) // parts))
        result = milp(
            objective,
            integrality=np.append(np.ones(len(group)), 0),
            bounds=Bounds(0, np.append(np.ones(len(group)), np.inf)),
            constraints=[
                LinearConstraint(_wide(one_each), 1, 1),
                LinearConstraint(_wide(-(-more // step)[None]), 0, room // step),
                LinearConstraint(worst, -np.inf, 0),
            ],
            options={"mip_rel_gap": _GAP},
        )
        if result.x is not None:
            picked = result.x[:-1] > 0.5
            if more[picked].sum() <= room:
                best = np.zeros(groups, np.int64)
                best[group[picked]] = choice[picked]
                return best
    raise RuntimeError(f"HiGHS: {result.message}")


def _wide(rows: NDArray | csr_array) -> csr_array:
    """Rows over the choices, extended by a zero column for the largest sum."""
    from scipy.sparse import csr_array, hstack

    rows = csr_array(rows)
    return csr_array(hstack([rows, csr_array((rows.shape[0], 1))]))


def _dominated(costs: NDArray, sizes: NDArray, allowed: NDArray) -> NDArray[np.bool_]:
    """[groups, choices] whether another choice is at most as large and at most as bad, and better in one of the two."""
    choices = sizes.shape[1]
    dominated = np.zeros_like(allowed)
    for this in range(choices):
        for other in range(choices):
            if this != other:
                no_worse = (costs[:, :, other] <= costs[:, :, this]).all(0) & (sizes[:, other] <= sizes[:, this])
                strict = (costs[:, :, other] < costs[:, :, this]).any(0) | (sizes[:, other] < sizes[:, this])
                dominated[:, this] |= allowed[:, other] & no_worse & (strict | (other < this))
    return dominated
