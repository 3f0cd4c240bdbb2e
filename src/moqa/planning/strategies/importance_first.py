"""`importance-first`: two bits more for the blocks that change their hidden states most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.placement import by_score, high_first
from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("importance-first", needs_sensitivity=False, needs_budget=True, is_control=True, floor=ALWAYS_USED,
          measures=("similarity",))  # fmt: skip
def importance_first(problem: Problem) -> Choice:
    """Two bits more for the blocks whose output a trained scorer expects to differ most from their input.

    QuantMoE-Bench (arXiv 2406.08155), the score of blocks.
    """
    profile = problem.profile
    predicted = np.mean([profile.statistics[name]["similarity"][:, 0].numpy() for name in problem.known], axis=0)
    return high_first(problem, by_score(problem, lambda row: -float(predicted[profile.record.units[row].layer])))
