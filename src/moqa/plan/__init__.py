"""Plans: which precision every unit gets, and why."""

from moqa.callable import callable_folder
from moqa.plan.budget import Budget
from moqa.plan.fit import Fit, fit
from moqa.plan.problem import HEDGED, STRATEGIES
from moqa.plan.record import Account, Options, Plan
from moqa.plan.run import DEFAULT_WIDTHS, for_file, plan, read_plan
from moqa.plan.ties import TIES

__all__ = [
    "DEFAULT_WIDTHS", "HEDGED", "STRATEGIES", "TIES", "Account", "Budget", "Fit", "Options", "Plan", "fit",
    "for_file", "plan", "read_plan",
]  # fmt: skip

callable_folder(__name__, plan)
