"""Multiple-choice knapsack: one width per group with the least error within the budget.

Cutting planes find the best Lagrangian bound, which decides nearly all groups; HiGHS decides the rest. So plans of
100,000 groups take seconds, and each comes with a proof of how much better any other plan could be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# A plan is as good as the best if no other can be better by more than this share of its error: profiles are far less
# precise than that.
_GAP = 1e-7
# HiGHS also stops at an absolute gap of 1e-6: errors are scaled up so that only the relative gap counts, even if a plan
# of wide widths has a millionth of the narrowest plan's error.
_SCALE = 1e6
# largest number of steps that sizes are divided into: first exact, then coarser and coarser
_PARTS = (2**62, 10**5, 10**4, 10**3)
# weight of the mean of several objectives, which breaks ties of the largest
_MEAN = 1e-3
_CUTS = 300
# of sums of errors, as a share
_ROUNDING = 1e-9
# HiGHS's nodes: a limit of work that is the same on every machine, unlike one of time
_NODES = 500
# groups that HiGHS decides at most, divided by the number of objectives
_CORE = 600
# widening steps that are tried after a choice was made to fit
_STEPS = 10_000


@dataclass(frozen=True)
class Solution:
    """A choice, and how good it is proven to be.

    Attributes:
        choice: [groups] index of the chosen width, int64.
        gap: no other choice has an error that is smaller by more than this share; None if that is not known.
        by: strategy that made it, if another was asked.
    """

    choice: NDArray[np.int64]
    gap: float | None
    by: str = ""


def solve(costs: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> Solution:
    """Choose one option per group so that the largest of several summed errors is minimal within a byte limit.

    >>> solve(np.array([[[9.0, 1.0], [4.0, 3.0]]]), np.array([[2, 4], [2, 4]]), limit=6).choice
    array([1, 0])

    Args:
        costs: [objectives, groups, choices] error of each choice, float64; infinite where a choice is not allowed.
            One objective is the plain knapsack; with several, the largest sum is minimised and the mean breaks ties.
        sizes: [groups, choices] bytes of each choice.
        limit: bytes of all groups together.

    Raises:
        ValueError: if the smallest choices exceed the limit.
    """
    allowed = np.asarray(np.isfinite(costs).all(axis=0))
    least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(1)
    if not allowed.any(1).all() or least.sum() > limit:
        raise ValueError(f"the smallest choices exceed {limit} bytes")
    allowed &= ~_dominated(costs, sizes, allowed)
    highest = np.where(allowed, costs, 0).max(2).sum(1).mean()
    problem = _Knapsack(np.where(allowed, costs * (_SCALE / max(highest, 1e-300)), np.inf), sizes, limit)
    bound, reduced, best = problem.relaxed()
    value = problem.value(best)
    if value - bound > _GAP * value:
        # a choice with a higher reduced cost would make every plan worse than the one that is known
        left = allowed & (reduced <= value - bound + _ROUNDING * value)
        open_, fixed = _core(left, reduced, len(costs))
        found, proven = problem.within(open_) if (open_.sum(1) > 1).any() else (best, value)
        best = min(best, found, key=problem.value)
        value = problem.value(best)
        if not fixed:
            bound = max(bound, min(proven, value))
    return Solution(best, max(value - bound, 0.0) / value if value > 0 else 0.0)


def _core(left: NDArray[np.bool_], reduced: NDArray[np.float64], objectives: int) -> tuple[NDArray[np.bool_], bool]:
    """The choices that are left, but only the likeliest for all groups except those that are hardest to decide.

    Returns:
        [groups, choices], and whether any choice was left out.
    """
    others = np.where(left, reduced, np.inf)
    likeliest = others.argmin(1)
    others[np.arange(len(left)), likeliest] = np.inf
    easy = others.min(1).argsort(kind="stable")[_CORE // objectives :]
    core = left.copy()
    core[easy] = False
    core[easy, likeliest[easy]] = True
    return core, bool((core != left).any())


@dataclass(frozen=True)
class _Knapsack:
    costs: NDArray[np.float64]
    sizes: NDArray[np.int64]
    limit: int

    def sums(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """[objectives] errors of a choice."""
        return self.costs[:, np.arange(len(choice)), choice].sum(1)

    def size(self, choice: NDArray[np.int64]) -> int:
        """Bytes of a choice."""
        return int(self.sizes[np.arange(len(choice)), choice].sum())

    def value(self, choice: NDArray[np.int64]) -> float:
        """What is minimised."""
        sums = self.sums(choice)
        return float(sums.max() + _MEAN * sums.mean())

    def relaxed(self) -> tuple[float, NDArray[np.float64], NDArray[np.int64]]:
        """The best Lagrangian bound by Kelley's cutting planes.

        The limit has a price per byte, and each objective a weight; for given prices every group chooses for itself.

        Returns:
            The bound, [groups, choices] reduced costs, and the best choice within the limit that was met.
        """
        from scipy.optimize import linprog

        objectives, groups, _ = self.costs.shape
        rows = np.arange(groups)
        best = self._smallest()
        room = max(self.limit - self.size(best), 1)
        more = (self.sizes - self.sizes[rows, best][:, None]) / room  # numbers that a linear program likes
        bound, reduced = -np.inf, np.zeros_like(more)
        cuts, limits = [], []
        choice, price, weights = best, 0.0, np.full(objectives, 1 / objectives)
        for _ in range(_CUTS):
            sums = self.sums(choice)
            # the bound is at most (weights + _MEAN / objectives) @ sums + price * (bytes above the room) for any choice
            cuts.append([*-sums, 1 - float(more[rows, choice].sum()), 1.0])
            limits.append(_MEAN * float(sums.mean()))
            model = linprog(
                [*np.zeros(objectives + 1), -1.0], A_ub=cuts, b_ub=limits, A_eq=[[1.0] * objectives + [0.0, 0.0]],
                b_eq=[1.0], bounds=[(0, 1)] * objectives + [(0, None), (None, None)],
            )  # fmt: skip
            if model.x is None or -model.fun <= bound + _GAP / 10 * abs(max(bound, 0.0)):
                break
            weights, price = model.x[:objectives], float(model.x[objectives])
            error = np.tensordot(weights + _MEAN / objectives, self.costs, 1)
            worth = error + price * more
            choice = worth.argmin(1)
            lowest = worth[rows, choice]
            dual = float(lowest.sum()) - price
            if dual > bound:
                bound, reduced = dual, worth - lowest[:, None]
            best = min(best, self._within_limit(choice, error), key=self.value)
        return bound, reduced, best

    def _smallest(self) -> NDArray[np.int64]:
        return np.where(np.isfinite(self.costs[0]), self.sizes, np.iinfo(np.int64).max).argmin(1)

    def _within_limit(self, choice: NDArray[np.int64], error: NDArray[np.float64]) -> NDArray[np.int64]:
        """A choice made smaller by steps that cost least per byte until it fits, then larger by the best that fit."""
        choice, rows = choice.copy(), np.arange(len(choice))
        over = self.size(choice) - self.limit
        if over > 0:
            saved = self.sizes[rows, choice][:, None] - self.sizes
            lost = error - error[rows, choice][:, None]
            rate = np.where(saved > 0, lost / np.maximum(saved, 1), np.inf)
            step = rate.argmin(1)
            order = rate[rows, step].argsort(kind="stable")
            count = int(np.searchsorted(saved[rows, step][order].cumsum(), over)) + 1
            if count > len(order) or not np.isfinite(rate[rows, step][order[count - 1]]):
                return self._smallest()
            choice[order[:count]] = step[order[:count]]
        room = self.limit - self.size(choice)
        more = self.sizes - self.sizes[rows, choice][:, None]
        gain = error[rows, choice][:, None] - error
        group, wider = np.nonzero((gain > 0) & (more <= room))
        steps = np.argsort(-gain[group, wider] / np.maximum(more[group, wider], 1), kind="stable")[:_STEPS]
        taken = set()
        for g, c in zip(group[steps].tolist(), wider[steps].tolist(), strict=True):
            if g not in taken and more[g, c] <= room:
                taken.add(g)
                choice[g] = c
                room -= int(more[g, c])
        return choice

    def within(self, left: NDArray[np.bool_]) -> tuple[NDArray[np.int64], float]:
        """The best choice among those that are left, by HiGHS, and a bound on them."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, csr_array

        # what a group has in any case is a constant
        base = np.where(left, self.sizes, np.iinfo(np.int64).max).argmin(1)
        rows = np.flatnonzero(left.sum(1) > 1)
        group, choice = np.nonzero(left[rows])
        several = self.costs[:, rows[group], choice] - self.costs[:, rows, base[rows]][:, group]
        count, columns = len(group), np.arange(len(group))
        one_each = csr_array(coo_array((np.ones(count), (group, columns)), shape=(len(rows), count)))
        worst = csr_array(np.concatenate([several, -np.ones((len(several), 1))], axis=1))
        objective = np.append(several.mean(0) * _MEAN, 1.0)
        start = self.sums(base)
        more, room = self.sizes[rows[group], choice] - self.sizes[rows, base[rows]][group], self.limit - self.size(base)
        exact = max(int(np.gcd.reduce(more)), 1)
        for parts in _PARTS:
            # HiGHS accepts 0.999999 as 1. Sizes counted in steps above the smallest choices are usually small enough
            # for this to make no difference; if not, the next round uses coarser steps, rounded so that the limit
            # still holds.
            step = max(exact, -(-int(more.max()) // parts))
            result = milp(
                objective,
                integrality=np.append(np.ones(count), 0),
                bounds=Bounds(np.append(np.zeros(count), -np.inf), np.append(np.ones(count), np.inf)),
                constraints=[
                    LinearConstraint(_wide(one_each), 1, 1),
                    LinearConstraint(_wide(-(-more // step)[None]), 0, room // step),
                    LinearConstraint(worst, -np.inf, -start),
                ],
                options={"mip_rel_gap": _GAP, "node_limit": _NODES},
            )
            if result.x is None:
                continue
            picked = result.x[:-1] > 0.5
            if more[picked].sum() <= room:
                best = base.copy()
                best[rows[group[picked]]] = choice[picked]
                # coarser steps leave out choices, so their bound holds for a smaller problem
                return best, result.mip_dual_bound + _MEAN * float(start.mean()) if step == exact else -np.inf
        return self._smallest(), -np.inf


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
