"""`random`: random widths, the control for every other strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("random", needs_budget=True, options=("seed",), is_control=True, floor=ALWAYS_USED)
def random(problem: Problem) -> Choice:
    """Groups widened in random order, each to a random width that still fits, until the budget is used."""
    generator = np.random.default_rng(problem.options.seed)
    choice = problem.smallest()
    order = generator.permutation(len(problem.groups))
    size = problem.bytes(choice)
    for index in order:
        more = problem.sizes[index] - problem.sizes[index, choice[index]]
        fitting = np.flatnonzero(problem.allowed[index] & (more >= 0) & (size + more <= problem.needed_limit))
        picked = int(generator.choice(fitting))
        size += int(more[picked])
        choice[index] = picked
    return problem.fill(choice, order.tolist())
