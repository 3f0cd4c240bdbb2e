"""`outliers-first`: two bits more for the weights with the largest outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moqa.planning.placement import by_score, high_first
from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("outliers-first", needs_sensitivity=False, needs_budget=True, is_control=True, floor=ALWAYS_USED,
          measures=("outliers",))  # fmt: skip
def outliers_first(problem: Problem) -> Choice:
    """Two bits more for the units with the largest ratio of a column's largest to its mean absolute weight.

    QuantMoE-Bench (arXiv 2406.08155), the score of linear weights.
    """
    scores = problem.profile.weights["outliers"].tolist()
    return high_first(problem, by_score(problem, scores.__getitem__))
