"""The two loops of quantization in torch, on any device: fitting each group's grid, and rounding GPTQ's columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.format.grid import ZERO_STEPS, Grid, Neighbours, nearest, to_groups
from moqa.format.levels import LevelGrid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.kernels.codes import nearest_codes

# factors by which a group's range is shrunk; twice as many improve nothing below 4 bits and the error by 1 % at 4
_SHRINKS = (1.0, 0.95, 0.9, 0.82, 0.72, 0.6)
_REFITS = 3
# a fit passes over its weights dozens of times: chunks that fit in the cache are ten times faster than whole stacks
_CHUNK_WEIGHTS = 2**18


@dataclass(frozen=True)
class Rounded:
    """Weights rounded to nearest on the grid with the smallest error.

    Attributes:
        grid: scales and zero-points, as they are stored.
        integers: [matrices, out, in] uint8.
        error: [matrices, out, groups] (weighted) squared error, float32.
    """

    grid: Grid
    integers: Tensor
    error: Tensor


@dataclass(frozen=True)
class Columns:
    """A stack of matrices whose columns are rounded one after the other, from the last to the first.

    Attributes:
        order: [matrices, in] columns of the matrices, the one that is rounded first at the end, int64.
        work: [matrices, in, out] weights in that order, float32; rounding a column subtracts its stored weights.
        factor: [matrices, in, in] lower triangular: L[j, k] / L[k, k] of the error of column j in the order is passed
            on to an earlier column k, float32; None passes on nothing, which only codes allow.
        scale: [matrices, groups, out] float32.
        offset: [matrices, groups, out] position of weight zero on the grid, float32; None for codes.
        top: [matrices, out] largest integer, float32; None for codes.
        integers: [matrices, in, out] uint8, columns in the order of the matrices: the result.
        group_size: columns of the matrices that share a scale.
        coded: what the integers are codes of; None if they are positions on a grid.
    """

    order: Tensor
    work: Tensor
    factor: Tensor | None
    scale: Tensor
    offset: Tensor | None
    top: Tensor | None
    integers: Tensor
    group_size: int
    coded: LevelGrid | None = None

    @classmethod
    def of(
        cls, weights: Tensor, grid: Grid | Neighbours | LevelGrid, order: Tensor, factor: Tensor | None
    ) -> "Columns":
        """Of [matrices, out, in] weights; columns are processed one by one, so each is contiguous in `work`."""
        n, rows, features = weights.shape
        work = torch.empty(n, features, rows)
        for matrix, sequence, out in zip(weights, order, work, strict=True):
            torch.index_select(matrix.T.contiguous(), 0, sequence, out=out)
        integers = torch.empty(n, features, rows, dtype=torch.uint8)
        scale = grid.scales().mT.contiguous()
        if isinstance(grid, LevelGrid):
            return cls(order, work, factor, scale, None, None, integers, grid.group_size, grid)
        offset, top = grid.offset().mT.contiguous(), grid.top[..., 0].expand(n, rows).contiguous()
        return cls(order, work, factor, scale, offset, top, integers, grid.group_size)


class TorchGrids:
    """`GridKernels` in torch, for devices that have no faster ones."""

    def fit_grid(self, weights: Tensor, widths: Tensor, scheme: Scheme, importance: Tensor | None) -> Rounded:
        """See `GridKernels`."""
        weights = weights.float()
        step = max(1, _CHUNK_WEIGHTS * weights.shape[1] // max(weights.numel(), 1))
        parts = [
            _fit(weights[:, i : i + step], scheme, widths[:, i : i + step], importance)
            for i in range(0, weights.shape[1], step)
        ]
        scale, top, error = (
            torch.cat(pieces, 1) for pieces in zip(*((g.scale, g.top, e) for g, e in parts), strict=True)
        )
        zero = None if scheme.symmetric else torch.cat([grid.zero for grid, _ in parts if grid.zero is not None], 1)
        grid = Grid(scale, zero, scheme.group_size, top)
        return Rounded(grid, grid.encode(weights), error)

    def fit_packed(self, weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        """See `GridKernels`."""
        widths = torch.full((1, len(weights)), scheme.width, device=weights.device)
        rounded = self.fit_grid(weights[None], widths, scheme, None)
        return rounded.grid[0].stored(self.pack(rounded.integers[0], scheme.width))

    def round_columns(self, columns: Columns, values: Tensor, first: int) -> None:
        """See `GridKernels`."""
        c, stacked = columns, torch.arange(len(values), device=values.device)
        last = first + values.shape[1]
        for at in reversed(range(first, last)):
            value = values[:, at - first]
            if c.factor is not None:
                errors = c.factor[:, at + 1 : last, at, None] * c.work[:, at + 1 : last]
                value = value + errors.sum(1) / c.factor[:, at, at, None]
            group = c.order[:, at] // c.group_size
            scale = c.scale[stacked, group]
            if c.coded is not None:
                integer, stored = nearest_codes(value, scale, c.coded)
            else:
                assert c.offset is not None
                assert c.top is not None
                offset = c.offset[stacked, group]
                integer = nearest(value[..., None], scale[..., None], offset[..., None], c.top[..., None])[..., 0]
                stored = scale * (integer - offset)
            c.integers[stacked, c.order[:, at]] = integer.to(torch.uint8)
            c.work[:, at] -= stored

    def pack(self, integers: Tensor, width: int) -> list[Tensor]:
        """See `GridKernels`."""
        return pack(integers, width)


def _fit(weights: Tensor, scheme: Scheme, widths: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    groups = to_groups(weights, scheme.group_size)
    # padding of a short last group is not stored and must not count
    weight = to_groups(torch.ones(weights.shape[-1], device=weights.device), scheme.group_size)
    if importance is not None:
        given = to_groups(importance, scheme.group_size)[:, None]
        # a group whose inputs were never active has no importance; equal weights keep its fit well defined
        weight = weight * (given + given.mean(-1, keepdim=True).clamp_min(1e-12) * 1e-2)
    top = (2.0 ** widths[..., None] - 1).expand(groups.shape[:-1])
    low = groups.amin(-1).clamp_max(0.0)
    high = groups.amax(-1).clamp_min(0.0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high * (top + 1) / (top - 1).clamp_min(1)
    grids = (_stored((high - low) * (shrink / top), low * shrink, scheme, top) for shrink in _SHRINKS)
    best = next(grids)
    error = _error(groups, weight, best)
    for grid in grids:
        best, error = _better(groups, weight, grid, best, error)
    for _ in range(_REFITS):
        best, error = _better(groups, weight, _refit(groups, weight, best, scheme), best, error)
    return best, error


def _stored(scale: Tensor, low: Tensor, scheme: Scheme, top: Tensor) -> Grid:
    stored = scale.to(getattr(torch, scheme.scale_dtype))
    if scheme.symmetric:
        return Grid(stored, None, scheme.group_size, top)
    used = stored.float()
    offset = torch.where(used > 0, -low / used, 0.0)
    zero = (offset * (ZERO_STEPS / top)).round().clamp(0, ZERO_STEPS).to(torch.uint8)
    return Grid(stored, zero, scheme.group_size, top)


def _error(groups: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    scale, offset = grid.scale.float()[..., None], grid.offset()[..., None]
    rounded = scale * (nearest(groups, scale, offset, grid.top[..., None]) - offset)
    return ((rounded - groups).square_() * weight).sum(-1)


def _better(groups: Tensor, weight: Tensor, grid: Grid, best: Grid, error: Tensor) -> tuple[Grid, Tensor]:
    new = _error(groups, weight, grid)
    win = new < error
    zero = None if grid.zero is None or best.zero is None else torch.where(win, grid.zero, best.zero)
    return Grid(torch.where(win, grid.scale, best.scale), zero, grid.group_size, grid.top), torch.where(win, new, error)


def _refit(groups: Tensor, weight: Tensor, grid: Grid, scheme: Scheme) -> Grid:
    """Least-squares scale, and offset if there is one, for the integers of the current grid."""
    scale, offset = grid.scale.float()[..., None], grid.offset()[..., None]
    integers = nearest(groups, scale, offset, grid.top[..., None])
    weight = weight.expand_as(groups)
    if not scheme.symmetric:
        total = weight.sum(-1)
        mean_q, mean_w = (weight * integers).sum(-1) / total, (weight * groups).sum(-1) / total
        offset = mean_q[..., None]
    steps = integers - offset
    spread = (weight * steps.square()).sum(-1)
    slope = torch.where(spread > 0, (weight * steps * groups).sum(-1) / spread, grid.scale.float()).clamp_min(0)
    return _stored(slope, slope if scheme.symmetric else mean_w - slope * mean_q, scheme, grid.top)
