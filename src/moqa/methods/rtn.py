"""`rtn`: round to nearest on the grid with the smallest squared error. Needs no data."""

import torch
from torch import Tensor

from moqa.format.grid import Neighbours
from moqa.format.scheme import Scheme
from moqa.kernels import find_grid_kernels
from moqa.methods.grid import fit_grid
from moqa.methods.levels import fit_levels, nearest_codes
from moqa.methods.registry import SolveBatch, method
from moqa.methods.result import GridResult, SolveResult


def _store(weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    if scheme.is_coded:
        widths = torch.full((1, len(weights)), scheme.width)
        batch = SolveBatch(weights.float()[None], widths, [], scheme, (len(weights),))
        return rtn(batch)[0].stored(scheme.width)
    weights = weights if weights.dtype == torch.bfloat16 else weights.float()
    return find_grid_kernels(weights.device).fit_packed(weights, scheme)


@method("rtn", store=_store)
def rtn(job: SolveBatch) -> SolveResult:
    """Rounding to nearest: on the grid of each group, from a search over clipped ranges and least-squares refits; or to
    the best codes.
    """
    if job.scheme.is_coded:
        levels = fit_levels(job.weights, job.scheme, job.widths, job.parts)
        return GridResult(nearest_codes(job.weights, levels), levels)
    rounded = fit_grid(job.weights, job.scheme, job.widths)
    if job.near is None:
        return GridResult(rounded.integers, rounded.grid)
    return GridResult(Neighbours.of(rounded.grid, job.near).nearest_to(rounded.integers), rounded.grid)
