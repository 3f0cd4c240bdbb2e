"""`rtn`: round to nearest on the grid with the smallest squared error. Needs no data."""

import torch
from torch import Tensor

from moqa.format.scheme import Scheme
from moqa.kernels import find_grid_kernels
from moqa.methods.grid import fit_grid
from moqa.methods.registry import SolveBatch, method
from moqa.methods.result import GridResult, SolveResult


def _store(weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    weights = weights if weights.dtype == torch.bfloat16 else weights.float()
    return find_grid_kernels(weights.device).fit_packed(weights, scheme)


@method("rtn", store=_store)
def rtn(job: SolveBatch) -> SolveResult:
    """A grid per group, from a search over clipped ranges and least-squares refits; then rounding to nearest."""
    rounded = fit_grid(job.weights, job.scheme, job.widths)
    return GridResult(rounded.integers, rounded.grid)
