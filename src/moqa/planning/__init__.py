"""Plans: which precision every unit gets."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.planning.budget import Budget
    from moqa.planning.engines import ENGINES
    from moqa.planning.fit import MemoryBudget, memory_budget
    from moqa.planning.record import PLAN, Account, Options, Plan
    from moqa.planning.registry import STRATEGIES, Strategy, strategy
    from moqa.planning.run import DEFAULT_WIDTHS, check_profile, for_file, plan, read_plan
    from moqa.planning.ties import TIES
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = [
    "DEFAULT_WIDTHS",
    "ENGINES",
    "PLAN",
    "STRATEGIES",
    "TIES",
    "Account",
    "Budget",
    "MemoryBudget",
    "Options",
    "Plan",
    "Strategy",
    "check_profile",
    "for_file",
    "memory_budget",
    "plan",
    "read_plan",
    "strategy",
]  # fmt: skip
