"""Strategies: what each needs stands beside it, and help, checks and errors are made from that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.registry import Registry, modules_in

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem

DEFAULT_STRATEGY = "moqa-budget"
# what every plan is compared with: the plain one, and the usual hand rule
PLAIN, HAND_RULE = "uniform", "frequency"


@dataclass(frozen=True)
class Strategy:
    """A way to choose widths.

    Attributes:
        name: as users type it; also that of its module, with "-" for "_".
        choose: the function.
        help: what it does, in one line.
        needs_sensitivity: whether it looks at what losing precision costs.
        needs_budget: whether it has no plan without one.
        needs_experts: whether it has no plan for dense models.
        hedge: default share of the model's own text in its objective; None: it takes no hedge.
        options: other options that change its plans.
        is_control: whether it is only there to be beaten.
    """

    name: str
    choose: Callable[[Problem], Choice]
    help: str
    needs_sensitivity: bool = True
    needs_budget: bool = False
    needs_experts: bool = False
    hedge: float | None = None
    options: tuple[str, ...] = ()
    is_control: bool = False

    @property
    def needs_profile(self) -> bool:
        """Whether its plans depend on what was measured."""
        return self.needs_sensitivity or self.needs_experts


# a module of the folder is a strategy
STRATEGIES: Registry[Strategy] = Registry(
    "--strategy", "moqa.planning.strategies", modules_in(Path(__file__).with_name("strategies"))
)


def strategy(
    name: str,
    *,
    needs_sensitivity: bool = True,
    needs_budget: bool = False,
    needs_experts: bool = False,
    hedge: float | None = None,
    options: tuple[str, ...] = (),
    is_control: bool = False,
) -> Callable[[Callable[[Problem], Choice]], Callable[[Problem], Choice]]:
    """Register a strategy; see `Strategy`. Its help is the first line of the function's docstring.

    >>> @strategy("frequency", needs_budget=True, needs_experts=True)
    ... def frequency(problem: Problem) -> Choice: ...
    """

    def register(choose: Callable[[Problem], Choice]) -> Callable[[Problem], Choice]:
        STRATEGIES[name] = Strategy(
            name, choose, (inspect.getdoc(choose) or "").partition("\n")[0], needs_sensitivity=needs_sensitivity,
            needs_budget=needs_budget, needs_experts=needs_experts, hedge=hedge, options=options, is_control=is_control,
        )  # fmt: skip
        return choose

    return register


def for_dense_models() -> list[str]:
    """Strategies to recommend for a model without experts, those that need least first."""
    found = [member for member in STRATEGIES.values() if not member.needs_experts and not member.is_control]
    return [member.name for member in sorted(found, key=lambda member: (member.needs_budget, member.name))]
