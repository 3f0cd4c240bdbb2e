"""`uniform`: one width for all units, the baseline of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moqa.planning.registry import strategy

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem


@strategy("uniform", needs_sensitivity=False)
def uniform(problem: Problem) -> Choice:
    """The widest width that fits, the same for every unit except for those with a larger smallest allowed width."""
    fitting = [choice for width in problem.widths if problem.fits(choice := problem.at_width(width))]
    return fitting[-1] if fitting else problem.smallest()
