"""`gptq`: round column by column and let the columns not yet rounded make up for the error."""

import torch
from torch import Tensor

from moqa.format.grid import Grid, fit_grid
from moqa.methods.inputs import Inputs
from moqa.methods.registry import Job, Result, method

DAMPING = 0.01
_BLOCK = 64


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
    index = order[:, None, :].expand(n, rows, features)
    work = weights.gather(2, index)
    group = index // grid.group_size
    scale, offset = grid.scale.float().gather(2, group), grid.offset().gather(2, group)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    top = grid.top[..., :1].expand(n, rows, 1)[..., 0]
    rounded = torch.empty_like(work)
    for start in range(0, features, _BLOCK):
        stop = min(start + _BLOCK, features)
        block, errors = work[:, :, start:stop].clone(), torch.empty(n, rows, stop - start)
        triangle = factor[:, start:stop, start:stop]
        for column in range(stop - start):
            at = start + column
            value = block[:, :, column]
            integer = (value * inverse[:, :, at] + offset[:, :, at]).round_().clamp_(min=0).minimum(top)
            rounded[:, :, at] = integer
            error = (value - scale[:, :, at] * (integer - offset[:, :, at])) / triangle[:, None, column, column]
            errors[:, :, column] = error
            block[:, :, column + 1 :] -= error[:, :, None] * triangle[:, None, column, column + 1 :]
        work[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return torch.empty_like(rounded).scatter_(2, index, rounded).to(torch.uint8)
