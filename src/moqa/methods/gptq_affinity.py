"""`gptq-affinity`: GPTQ whose experts see each token as often as its gate weight says."""

from moqa.methods.gptq import gptq
from moqa.methods.registry import SolveBatch, method
from moqa.methods.result import SolveResult


@method("gptq-affinity", affinity=0.5)
def gptq_affinity(job: SolveBatch) -> SolveResult:
    """GPTQ with gate-weighted Gram matrices: a sum of c x x^T over an expert's tokens, for gate weights c.

    `gptq` weights by the square of c, which is the squared error of the block's output.

    MoEQuant (arXiv 2505.03804), affinity-guided quantization.
    """
    return gptq(job)
