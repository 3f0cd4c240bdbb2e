"""`gptq`: round column by column and let the columns not yet rounded make up for the error."""

import torch
from torch import Tensor

from moqa.format.grid import Grid
from moqa.kernels import Columns, find_kernels
from moqa.methods.grid import fit_grid
from moqa.methods.inputs import Inputs
from moqa.methods.registry import Job, Result, method

DAMPING = 0.01
# columns that are rounded before all later ones learn of their errors
_BLOCK = 64


@method("gptq", needs_data=True)
def gptq(job: Job) -> Result:
    """GPTQ for a stack of matrices at once, columns in order of falling input energy, static groups.

    The grid weighs each input feature's error by its energy. Stack entries that no token reached are rounded as `rtn`
    does.

    GPTQ (arXiv 2210.17323), algorithm 1; the batch over experts and the damping by token count are ours.
    """
    energy = torch.stack([inputs.energy for inputs in job.inputs])
    grid = fit_grid(job.weights, job.scheme, job.widths, energy).grid
    order = energy.argsort(dim=1, descending=True, stable=True)
    factor = torch.stack([_factor(inputs, columns) for inputs, columns in zip(job.inputs, order, strict=True)])
    integers = _round(job.weights, grid, order, factor)
    return Result(integers, grid)


def damping(features: int, tokens: int) -> float:
    """Share of the mean energy that is added to every feature's.

    It grows with the inverse of the token count: an expert that saw 30 tokens has a Gram matrix of rank 30, and an
    undamped solve then fits noise (docs/results/ablations.md).
    """
    return DAMPING * max(1.0, features / tokens)


def _factor(inputs: Inputs, order: Tensor) -> Tensor:
    """[in, in] share of an earlier column's error (row) that a later one takes, columns in the given order.

    GPTQ's updates by the Cholesky factor U of the inverse Gram matrix add up to this: with R R^T the Gram matrix, R
    upper triangular and U = R^-1, the weight that column k is rounded from is its own plus the sum over earlier
    columns j of their error times R[j, k] / R[k, k]. So neither an inverse nor U is needed.
    """
    features, mean = len(inputs.energy), inputs.energy.mean()
    if inputs.tokens == 0 or mean <= 0:
        return torch.eye(features)
    backwards = order.flip(0)
    gram = inputs.fit.index_select(0, backwards).index_select(1, backwards).double().div_(mean)
    gram.diagonal().add_(damping(features, inputs.tokens))
    factor = torch.linalg.cholesky(gram)
    return factor.div_(factor.diagonal().clone()).float().flip(0, 1)


def _round(weights: Tensor, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """[n, rows, in] integers; every column is rounded from its weight and the errors of those before it in `order`."""
    n, rows, features = weights.shape
    kernels = find_kernels("auto", weights.device)
    columns = Columns(
        # columns are worked on one by one: each of them lies in one piece, [n, in, rows]
        order=order, work=weights.mT.gather(1, order[:, :, None].expand(n, features, rows)), factor=factor,
        scale=grid.scale.float().mT.contiguous(), offset=grid.offset().mT.contiguous(),
        top=grid.top[..., 0].expand(n, rows).contiguous(),
        integers=torch.empty(n, features, rows, dtype=torch.uint8), group_size=grid.group_size,
    )  # fmt: skip
    for first in range(0, features, _BLOCK):
        last = min(first + _BLOCK, features)
        values = torch.baddbmm(columns.work[:, first:last], factor[:, :first, first:last].mT, columns.work[:, :first])
        kernels.round_columns(columns, values, first)
    return columns.integers.mT.contiguous()
