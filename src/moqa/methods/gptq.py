"""`gptq`: round column by column and let the columns not yet rounded make up for the error."""

import torch
from torch import Tensor

from moqa.format.grid import Grid, fit_grid
from moqa.methods.inputs import Inputs
from moqa.methods.registry import Job, Result, method

DAMPING = 0.01
_BLOCK = 16


@method("gptq", needs_data=True)
def gptq(job: Job) -> Result:
    """GPTQ for a stack of matrices at once, columns in order of falling input energy, static groups.

    The grid weighs each input feature's error by its energy. Stack entries that no token reached are rounded as `rtn`
    does.

    GPTQ (arXiv 2210.17323), algorithm 1; the batch over experts and the damping by token count are ours.
    """
    energy = torch.stack([inputs.fit.diagonal() for inputs in job.inputs])
    grid = fit_grid(job.weights, job.scheme, job.widths, energy)
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
    """[in, in] upper Cholesky factor of the inverse of the damped Gram matrix, columns in the given order."""
    features = len(inputs.fit)
    mean = inputs.fit.diagonal().mean()
    if inputs.tokens == 0 or mean <= 0:
        return torch.eye(features)
    gram = inputs.fit[order][:, order].double() / mean
    gram.diagonal().add_(damping(features, inputs.tokens))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round(weights: Tensor, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """[n, rows, in] integers; every rounding error is pushed into the columns that come later in `order`."""
    n, rows, features = weights.shape

    # columns are worked on one by one: each of them lies in one piece here, [n, in, rows]
    def columns_of(table: Tensor, index: Tensor) -> Tensor:
        return table.mT.gather(1, index[:, :, None].expand(n, features, rows))

    work = columns_of(weights, order)
    group = order // grid.group_size
    scale, offset = columns_of(grid.scale.float(), group), columns_of(grid.offset(), group)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    top = grid.top[..., 0].expand(n, rows)
    rounded = torch.empty(n, features, rows, dtype=torch.uint8)
    for start in range(0, features, _BLOCK):
        stop = min(start + _BLOCK, features)
        errors = torch.empty(n, stop - start, rows)
        for at in range(start, stop):
            value = work[:, at]
            integer = (value * inverse[:, at]).add_(offset[:, at]).round_().clamp_(min=0).minimum(top)
            rounded[:, at] = integer
            error = (value - scale[:, at] * (integer - offset[:, at])).div_(factor[:, at, at, None])
            errors[:, at - start] = error
            work[:, at + 1 : stop].sub_(factor[:, at, at + 1 : stop, None] * error[:, None])
        work[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    back = order.argsort(1)
    return rounded.gather(1, back[:, :, None].expand(n, features, rows)).mT.contiguous()
