"""moqa gives precision to the parts of a Mixture-of-Experts model that the data needs.

>>> import moqa
>>> moqa.compress("reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "3bpw", "runs/out")
>>> model, tokenizer = moqa.load("runs/out")

The same in steps, each with an artifact that can be looked at and reused:

>>> profile = moqa.profile("reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "runs/profile")
>>> plan = moqa.plan(profile, "3bpw")
>>> out = moqa.quantize("reference/model", plan, "runs/out")
>>> moqa.evaluate(out, {"wiki": "wiki.held-out.txt"}).distributions["wiki"].kl_divergence

Every name below is imported when it is first used: `import moqa` alone loads nothing heavy. On a system that moqa does
not run on, it works too, and the first use is a `MoqaError`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError
from moqa.integrations.on_import import on_import
from moqa.support import Refusal, unsupported

if TYPE_CHECKING:
    from moqa.adjustment import Adjusted, adjust
    from moqa.data import Distribution
    from moqa.evaluation import Evaluation, evaluate
    from moqa.execution import find_executor
    from moqa.format.reader import open_checkpoint
    from moqa.generation import Sampling, generate
    from moqa.memory.limit import MemoryLimit
    from moqa.planning import Budget, MemoryBudget, Plan, memory_budget, plan, read_plan
    from moqa.profiling import Profile, profile, read_profile
    from moqa.quantization import quantize
    from moqa.reports import report
    from moqa.runtime.load import load
    from moqa.speed import Speed, bench

    __version__: str  # that of pyproject.toml, read when it is asked for

# where each public name is defined; the imports above say the same to type checkers
_HOMES = {
    "moqa.adjustment": ("Adjusted", "adjust"),
    "moqa.data": ("Distribution",),
    "moqa.evaluation": ("Evaluation", "evaluate"),
    "moqa.execution": ("find_executor",),
    "moqa.format.reader": ("open_checkpoint",),
    "moqa.generation": ("Sampling", "generate"),
    "moqa.memory.limit": ("MemoryLimit",),
    "moqa.planning": ("Budget", "MemoryBudget", "Plan", "memory_budget", "plan", "read_plan"),
    "moqa.profiling": ("Profile", "profile", "read_profile"),
    "moqa.quantization": ("quantize",),
    "moqa.reports": ("report",),
    "moqa.runtime.load": ("load",),
    "moqa.speed": ("Speed", "bench"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (functions first, in the order of the work)
    "profile", "plan", "quantize", "evaluate", "report", "load", "generate", "adjust", "bench",
    "memory_budget", "read_plan", "read_profile", "open_checkpoint", "find_executor",
    "Adjusted", "Budget", "Distribution", "Evaluation", "MemoryBudget", "MemoryLimit", "MoqaError", "Plan", "Profile",
    "Sampling", "Speed",
]  # fmt: skip

if unsupported():
    sys.meta_path.insert(0, Refusal())
else:
    # from here on transformers' from_pretrained reads moqa's checkpoints
    on_import("transformers.quantizers.auto", "moqa.integrations.transformers")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than moqa

        return globals().setdefault(name, version("moqa"))
    if name not in _HOME:
        raise AttributeError(f"module 'moqa' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
