"""Strategies: each declares its requirements; help, checks and error messages are derived from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.registry import Registry, modules_in

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem
    from moqa.planning.solver import Solution

# the default takes the plan of least expected divergence, or a uniform one
DEFAULT_STRATEGY, OPTIMUM = "auto", "budget"
# smallest width that rules without a price for it give to units that every token uses
ALWAYS_USED = 4
# strategies that do not mix encodings take the first that has a width
DEFAULT_ENCODINGS = ("int", "trellis")
# baselines of every comparison: the uniform plan, and bits by routing frequency, the usual heuristic
PLAIN, HAND_RULE = "uniform", "frequency"


@dataclass(frozen=True)
class Strategy:
    """A way to choose the width of every unit; its help is the first line of the function's docstring.

    Attributes:
        name: as users type it; its module has the same name, with "_" for "-".
        choose: the function that makes the choice; one that minimises an error also says how well it is proven.
        needs_sensitivity: whether it uses the measured sensitivities.
        needs_budget: whether it cannot make a plan without a budget.
        needs_experts: whether it cannot make a plan for dense models.
        hedge: stored bits per weight of a budget -> default share of the model's own text in its objective; None if it
            has no hedge.
        options: other options that change its plans.
        floor: smallest width of units that are no experts, in models with experts, if the user gives none.
        mixes: whether it chooses among encodings and group sizes, too; else a plan has one of each per width.
        is_control: whether it is only for comparisons: a control, or a rule of the literature.
        measures: statistics that it needs and profiles do not hold (`moqa.profiling.further`).
    """

    name: str
    choose: Callable[[Problem], Choice | Solution]
    _: KW_ONLY
    needs_sensitivity: bool = True
    needs_budget: bool = False
    needs_experts: bool = False
    hedge: Callable[[float | None], float] | None = None
    options: tuple[str, ...] = ()
    floor: int = 0
    mixes: bool = False
    is_control: bool = False
    measures: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """One line on what it does."""
        return (inspect.getdoc(self.choose) or "").partition("\n")[0]

    @property
    def needs_profile(self) -> bool:
        """Whether its plans depend on measurements."""
        return self.needs_sensitivity or self.needs_experts


# every module in the folder is a strategy
STRATEGIES: Registry[Strategy] = Registry(
    "--strategy",
    modules_in("moqa.planning.strategies", Path(__file__).with_name("strategies")),
    aliases={"moqa": "paper", "moqa-v1": "paper-v1", "moqa-budget": OPTIMUM},  # the names of 0.1
)
strategy = STRATEGIES.decorator(Strategy)


def for_dense_models() -> list[str]:
    """Strategies to recommend for a model without experts, those with the fewest requirements first."""
    suitable = [member for member in STRATEGIES.values() if not member.needs_experts and not member.is_control]
    return [member.name for member in sorted(suitable, key=lambda member: (member.needs_budget, member.name))]
