"""moqa gives precision to the parts of a Mixture-of-Experts model that the data needs.

>>> import moqa  # doctest: +SKIP
>>> moqa.compress("reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "3bpw", "runs/out")
>>> model, tokenizer = moqa.load("runs/out")

The same step by step; every step makes an artifact that can be inspected and reused:

>>> profile = moqa.profile("reference/model", {"wiki": "wiki.txt", "novels": "novels.txt"}, "runs/profile")
>>> plan = moqa.plan(profile, "3bpw")
>>> out = moqa.quantize("reference/model", plan, "runs/out")
>>> moqa.evaluate(out, {"wiki": "wiki.test.txt"}).distributions["wiki"].kl_divergence

Every name below is imported when it is first used: `import moqa` alone loads nothing heavy. On an unsupported system
the import still works, and the first use raises a `MoqaError`.
"""

import sys
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.integrations.on_import import on_import
from moqa.lazy import lazily
from moqa.support import Refusal, unsupported

if TYPE_CHECKING:
    from moqa.adjustment import Adjusted, adjust
    from moqa.compression.options import CompressOptions
    from moqa.compression.result import CompressResult
    from moqa.compression.run import compress
    from moqa.data import Distribution
    from moqa.evaluation import Evaluation, evaluate
    from moqa.evaluation.compare import PlanComparison, compare_plans
    from moqa.execution import find_executor
    from moqa.exports import Exported, export
    from moqa.format.reader import open_checkpoint
    from moqa.generation import Sampling
    from moqa.memory.limit import MemoryLimit
    from moqa.mixture.build import BuiltMixture, build_mixture
    from moqa.mixture.evaluate import MixtureEvaluation, evaluate_mixture
    from moqa.mixture.evaluate_merged import MergedEvaluation, evaluate_merged
    from moqa.mixture.generate import generate
    from moqa.mixture.load import load
    from moqa.mixture.merge import merge
    from moqa.planning import Budget, MemoryBudget, Plan, memory_budget, plan, read_plan
    from moqa.profiling import Profile, profile, read_profile
    from moqa.quantization import quantize
    from moqa.reduction import reduce
    from moqa.reports import report
    from moqa.speed import Speed, bench
    from moqa.training import Recovered, recover

    __version__: str  # from pyproject.toml, read at the first access

__all__ = [  # noqa: RUF022  (functions first, in the order of the work)
    "compress", "profile", "plan", "compare_plans", "quantize", "recover", "reduce", "evaluate", "report", "export",
    "load", "generate", "adjust", "build_mixture", "evaluate_mixture", "merge", "evaluate_merged", "bench",
    "memory_budget", "read_plan", "read_profile", "open_checkpoint", "find_executor",
    "Adjusted", "Budget", "BuiltMixture", "CompressOptions", "CompressResult", "Distribution", "Evaluation", "Exported",
    "MemoryBudget", "MemoryLimit", "MergedEvaluation", "MixtureEvaluation", "MoqaError", "Plan", "PlanComparison",
    "Profile", "Recovered", "Sampling", "Speed",
]  # fmt: skip

if not TYPE_CHECKING:
    _found, __dir__ = lazily(__name__, __file__)

    def __getattr__(name: str) -> object:
        if name != "__version__":
            return _found(name)
        from importlib.metadata import version  # takes longer to import than moqa

        return globals().setdefault(name, version("moqa"))


if unsupported():
    sys.meta_path.insert(0, Refusal())
else:
    # from here on transformers' from_pretrained reads moqa's checkpoints
    on_import("transformers.quantizers.auto", "moqa.integrations.transformers")
    on_import("peft.utils.transformers_weight_conversion", "moqa.integrations.peft")
