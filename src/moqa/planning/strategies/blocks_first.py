"""`blocks-first`: two bits more for the first blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moqa.planning.placement import by_score, high_first
from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("blocks-first", needs_sensitivity=False, needs_budget=True, is_control=True, floor=ALWAYS_USED)
def blocks_first(problem: Problem) -> Choice:
    """Two bits more for the units of the first blocks.

    QuantMoE-Bench (arXiv 2406.08155), the placement by depth.
    """
    units = problem.profile.record.units
    return high_first(problem, by_score(problem, lambda row: -float(units[row].layer)))
