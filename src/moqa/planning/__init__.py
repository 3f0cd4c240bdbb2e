"""Plans: which precision every unit gets, and why."""

from moqa.planning.budget import Budget
from moqa.planning.fit import MemoryBudget, memory_budget
from moqa.planning.problem import HEDGED, STRATEGIES
from moqa.planning.record import Account, Options, Plan
from moqa.planning.run import DEFAULT_WIDTHS, for_file, plan, read_plan
from moqa.planning.ties import TIES

__all__ = [
    "DEFAULT_WIDTHS",
    "HEDGED",
    "STRATEGIES",
    "TIES",
    "Account",
    "Budget",
    "MemoryBudget",
    "Options",
    "Plan",
    "for_file",
    "memory_budget",
    "plan",
    "read_plan",
]  # fmt: skip
