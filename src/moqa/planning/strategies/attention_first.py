"""`attention-first`: high precision for what every token uses, the rest for the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem

HIGHEST = 8


@strategy("attention-first", needs_sensitivity=False, needs_budget=True, needs_experts=True, is_control=True,
          floor=ALWAYS_USED)  # fmt: skip
def attention_first(problem: Problem) -> Choice:
    """Attention and shared experts as wide as possible, up to 8 bits; one width for all routed experts.

    QuantMoE-Bench (arXiv 2406.08155) gives 4 bits to attention and shared experts beside routed ones of 2; all hand
    rules here do so by their floor, and this one goes further.
    """
    routed = np.array([any(unit.role == "expert" for unit in group.units) for group in problem.groups])
    used = np.flatnonzero(~routed).tolist()
    choice = problem.smallest()
    for high in (width for width in reversed(problem.widths) if width <= HIGHEST):
        found = np.where(routed, choice, problem.at_width(high))
        if problem.fits(found):
            choice = found
            break
    for low in problem.widths:
        found = np.where(routed, np.maximum(problem.at_width(low), choice), choice)
        if problem.fits(found):
            choice = found
    return problem.fill(problem.fill(choice, np.flatnonzero(routed).tolist()), used)
