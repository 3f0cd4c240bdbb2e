"""`gptq-plain`: GPTQ whose experts see all of their tokens alike."""

from moqa.methods.gptq import gptq
from moqa.methods.registry import SolveBatch, method
from moqa.methods.result import SolveResult


@method("gptq-plain", affinity=0.0)
def gptq_plain(job: SolveBatch) -> SolveResult:
    """GPTQ with the Gram matrices of the inputs alone, as for dense models; the baseline of affinity guidance."""
    return gptq(job)
