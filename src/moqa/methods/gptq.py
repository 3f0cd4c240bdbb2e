"""`gptq`: round column by column and let the columns not yet rounded compensate for the error."""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics
from moqa.format.grid import Grid, Neighbours
from moqa.format.levels import LevelGrid
from moqa.format.tiles import TILE
from moqa.kernels import Columns, GridKernels, find_grid_kernels
from moqa.methods.grid import fit_grid
from moqa.methods.levels import fit_levels
from moqa.methods.registry import SolveBatch, method
from moqa.methods.result import GridResult, SolveResult
from moqa.models.products import fast_sums

DAMPING = 0.01
# the same for gradients, whose Gram matrix is known less well
_OUTPUT_DAMPING = 0.1
# Rows of a tile that are rounded together, before their errors are passed on to its other rows. Fewer would gain a
# little, and take longer: rows of a trellis are rounded in sequences along the tiles.
_ROWS = 4
# columns that are rounded before their errors are passed on to the others
_BLOCK = 64
# Steps of codes by width, 0 to 4, relative to those that fit the weights: weights are rounded with the errors that were
# passed on to them, which together spread further.
_ROOM = (1.0, 1.5, 1.25, 1.15, 1.0)
# columns of a Cholesky factor that are computed together
_PANEL = 192

AnyGrid = Grid | Neighbours | LevelGrid


@method("gptq")
def gptq(job: SolveBatch) -> SolveResult:
    """GPTQ for a stack of matrices at once, columns in order of falling input energy, static groups.

    The grid weights each input feature's error by its energy. Stack entries that no token reached are rounded as by
    `rtn`. With gradients at the outputs, rows make up for the errors of other rows as columns do for those of columns.

    GPTQ (arXiv 2210.17323), algorithm 1; the batch over experts, the damping by token count and wider steps of codes
    are ours. A Hessian that is a product of one of inputs and one of outputs is that of YAQA (arXiv 2505.22988), which
    rounds by both at once; rounding by groups of rows is ours, and keeps the best path through a trellis.
    """
    energy = torch.stack([inputs.energy for inputs in job.inputs])
    grid = _fitted(job, energy)
    # the last one is rounded first, so that the factor is that of a Cholesky factorization
    order = energy.argsort(dim=1, stable=True)
    factor = torch.empty(*order.shape, order.shape[1])
    for inputs, columns, out in zip(job.inputs, order, factor, strict=True):
        _factor(inputs, columns, out)
    known = any(gram is not None for grams in job.outputs for gram in grams)
    by_rows = known and not any(rows % TILE for rows in job.parts)
    allowed = grid if job.near is None or isinstance(grid, LevelGrid) else Neighbours.of(grid, job.near)
    chosen = (_round_by_rows if by_rows else _round)(job, allowed, order, factor)
    return GridResult(allowed.lower + chosen if isinstance(allowed, Neighbours) else chosen, grid)


def _fitted(job: SolveBatch, energy: Tensor) -> Grid | LevelGrid:
    """Scales of a job's encoding, with each input feature's error weighted by its energy."""
    if job.scheme.is_coded:
        reached = torch.tensor([inputs.tokens > 0 for inputs in job.inputs], device=job.widths.device)[:, None]
        room = torch.where(reached, torch.tensor(_ROOM, device=job.widths.device)[job.widths.long()], 1.0)
        return fit_levels(job.weights, job.scheme, job.widths, job.parts, energy, room)
    return fit_grid(job.weights, job.scheme, job.widths, energy).grid


def damping(features: int, tokens: int) -> float:
    """Share of the mean energy that is added to the energy of every feature.

    It grows with the inverse of the token count: an expert that received 30 tokens has a Gram matrix of rank 30, and an
    undamped solve then fits noise (docs/results/ablations.md).
    """
    return DAMPING * max(1.0, features / tokens)


def _factor(inputs: InputStatistics, order: Tensor, out: Tensor) -> None:
    """Fill [in, in] with the Cholesky factor L, lower triangular, of the inputs' Gram matrix in an order of columns.

    GPTQ's updates with the Cholesky factor of the inverse Gram matrix are equivalent to this: with columns from the
    last to the first, column k is rounded from its own weight plus the sum over later columns j of their error times
    L[j, k] / L[k, k]. So no inverse is needed.
    """
    features, mean = len(inputs.energy), inputs.energy.mean()
    if inputs.tokens == 0 or mean <= 0:
        torch.eye(features, out=out)
        return
    gram = inputs.fit.index_select(0, order).index_select(1, order)
    gram.diagonal().add_(damping(features, inputs.tokens) * mean)
    _fill_factor(gram, out)


def _fill_factor(gram: Tensor, out: Tensor) -> None:
    out.copy_(gram)
    if not _cholesky(out):  # indefinite due to rounding
        out.copy_(torch.linalg.cholesky(gram.double()))


def _cholesky(matrix: Tensor) -> bool:
    """Replace the lower triangle of [n, n] with the Cholesky factor; returns False, and leaves a part, if none exists.

    In blocks: LAPACK's own, through torch, takes three times as long, for copies and the other triangle.
    """
    for begin in range(0, len(matrix), _PANEL):
        end = begin + _PANEL
        corner, failed = torch.linalg.cholesky_ex(matrix[begin:end, begin:end])
        if failed:
            return False
        matrix[begin:end, begin:end] = corner
        if end < len(matrix):
            below = torch.linalg.solve_triangular(corner.mT, matrix[end:, begin:end], upper=True, left=False)
            matrix[end:, begin:end] = below
            for first in range(end, len(matrix), _PANEL):
                part = below[first - end :]
                matrix[first:, first : first + _PANEL].addmm_(part, part[:_PANEL].T, alpha=-1)
    return True


def _round_by_rows(job: SolveBatch, grid: AnyGrid, order: Tensor, factor: Tensor) -> Tensor:
    """[n, rows, in] integers; the last rows of every tile are rounded first, and the others make up for their errors.

    With the Cholesky factor L of a Gram matrix of outputs and total errors E, the loss is the sum of squares of L^T E,
    times the inputs' Gram matrix: so block k of rows, given those of the later blocks j, is rounded from its weights
    plus the solution x of L[k, k]^T x = sum of L[j, k]^T E[j].
    """
    count, groups = len(job.weights), TILE // _ROWS
    # rows of one group in all tiles, for each part and for all of them together
    tiles = [torch.arange(rows).view(-1, groups, _ROWS).movedim(1, 0).flatten(1) for rows in job.parts]
    begins = [0, *accumulate(job.parts)]
    rows = torch.cat([begin + part for begin, part in zip(begins, tiles, strict=False)], 1)
    spans = [slice(begin // groups, end // groups) for begin, end in pairwise(begins)]
    factors = [
        [None if gram is None else _output_factor(gram, at.flatten()) for gram, at in zip(of, tiles, strict=True)]
        for of in job.outputs
    ]
    integers = torch.empty(job.weights.shape, dtype=torch.uint8)
    errors = torch.empty(groups, count, rows.shape[1], job.weights.shape[2])
    for k in reversed(range(groups)):
        weights = job.weights[:, rows[k]]
        target = weights.clone()
        for entry, of_units in enumerate(factors):
            for known, span in zip(of_units, spans, strict=True):
                if known is not None and k + 1 < groups:
                    _pass_on(known, k, errors[:, entry, span], target[entry, span])
        part = grid[:, rows[k]]
        if isinstance(part, LevelGrid):
            part = replace(part, parts=tuple(size // groups for size in job.parts), apart=_ROWS)
        found = _round(replace(job, weights=target), part, order, factor)
        integers[:, rows[k]] = found
        torch.sub(weights, part.decode(found), out=errors[k])
    return integers


def _output_factor(gram: Tensor, order: Tensor) -> Tensor | None:
    """Cholesky factor, lower triangular, of outputs in an order; None if they had no gradients."""
    mean = gram.diagonal().mean()
    if not mean > 0:
        return None
    gram = gram.index_select(0, order).index_select(1, order).div_(mean)
    gram.diagonal().add_(_OUTPUT_DAMPING)
    factor = torch.empty_like(gram)
    _fill_factor(gram, factor)
    return factor


def _pass_on(factor: Tensor, k: int, errors: Tensor, target: Tensor) -> None:
    """Add to the target of block k, [rows, in], what makes up for the later ones of all [blocks, rows, in] errors."""
    size = len(target)
    mine = slice(k * size, (k + 1) * size)
    with fast_sums():
        later = factor[mine.stop :, mine].T @ errors[k + 1 :].flatten(0, 1)
    target += torch.linalg.solve_triangular(factor[mine, mine].T, later, upper=True)


def _round(job: SolveBatch, grid: AnyGrid, order: Tensor, factor: Tensor) -> Tensor:
    """[n, rows, in] integers; every column is rounded from its weight and the errors of later columns in `order`."""
    columns = Columns.of(job.weights, grid, order, factor)
    _from_last(columns, find_grid_kernels(job.weights.device), 0, job.weights.shape[2], None)
    return columns.integers.mT.contiguous()


def _from_last(columns: Columns, kernels: GridKernels, first: int, last: int, errors: Tensor | None) -> None:
    """Round columns `first` to `last`: the later half, then the earlier half with the errors of the later one.

    So errors are passed on in few large products. The number of operations is the same as if each block received the
    errors of all later columns, but most of these are read a few times instead of once per block.

    Args:
        columns: the stack; its columns from `last` on are already rounded.
        kernels: that round a block.
        first: column.
        last: column after the last one.
        errors: [n, last - first, rows] errors of the columns from `last` on, as passed on to these columns.
    """
    blocks, factor = -(-(last - first) // _BLOCK), columns.factor
    assert factor is not None
    if blocks == 1:
        values = columns.work[:, first:last]
        if errors is not None:
            values = (errors / factor.diagonal(dim1=1, dim2=2)[:, first:last, None]).add_(values)
        kernels.round_columns(columns, values.contiguous(), first)
        return
    middle = first + blocks // 2 * _BLOCK
    _from_last(columns, kernels, middle, last, None if errors is None else errors[:, middle - first :])
    share, later = factor[:, middle:last, first:middle], columns.work[:, middle:last]
    beta = 0 if errors is None else 1
    earlier = torch.empty_like(columns.work[:, first:middle]) if errors is None else errors[:, : middle - first]
    with fast_sums():
        # one by one: a batched product copies operands that are not contiguous
        for out, left, right in zip(earlier, share, later, strict=True):
            out.addmm_(left.T, right, beta=beta)
    _from_last(columns, kernels, first, middle, earlier)
