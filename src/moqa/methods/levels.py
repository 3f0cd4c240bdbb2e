"""Scales and factors of coded weights: from the deviation of each group, then least-squares refits to the levels."""

import torch
from torch import Tensor

from moqa.format.grid import to_groups
from moqa.format.levels import DEVIATION, FACTORS, LevelGrid, levels
from moqa.format.scheme import Scheme
from moqa.kernels import Columns, find_grid_kernels

_REFITS = 3
_BLOCK = 64


def fit_levels(
    weights: Tensor, scheme: Scheme, widths: Tensor, parts: tuple[int, ...], importance: Tensor | None = None,
    room: Tensor | None = None,
) -> LevelGrid:  # fmt: skip
    """Scales and factors for matrices that are stored as codes.

    >>> widths = torch.full((1, 32), 2)
    >>> fit_levels(torch.randn(1, 32, 64), Scheme(width=2, encoding="trellis"), widths, (32,)).factor.shape
    torch.Size([1, 32, 1])

    Args:
        weights: [matrices, out, in] float32.
        scheme: encoding, group size and scale dtype.
        widths: [matrices, out] bits of each row, int.
        parts: rows of each matrix that is stacked along `out`.
        importance: [matrices, in] weight of each input feature's squared error, float32; None means equal.
        room: [matrices, out] how many times the steps that fit the weights are taken, float32; None means once.
    """
    # by powers of two, so that nothing is rounded and squares of any weights are numbers
    size = torch.frexp(weights.abs().amax(-1, keepdim=True)).exponent.clamp_min(-100)
    groups = to_groups(torch.ldexp(weights, -size), scheme.group_size)
    # padding of a short last group is not stored and must not count
    weight = to_groups(torch.ones(weights.shape[-1]), scheme.group_size)
    if importance is not None:
        given = to_groups(importance, scheme.group_size)[:, None]
        weight = weight * (given + given.mean(-1, keepdim=True).clamp_min(1e-12) * 1e-2)
    total = weight.sum(-1)
    steps = (groups.square().mul_(weight).sum(-1) / total).sqrt()
    deviation = torch.zeros(max(DEVIATION[scheme.encoding]) + 1)
    for width, value in DEVIATION[scheme.encoding].items():
        deviation[width] = value
    steps /= deviation[widths][..., None]
    if scheme.encoding == "table":
        for _ in range(_REFITS):
            steps = _refit(groups, weight, steps, widths)
    if room is not None:
        steps *= room[..., None]
    dtype = getattr(torch, scheme.scale_dtype)
    # the largest level of the largest step is a number, too
    steps = torch.ldexp(steps, size).clamp_max(torch.finfo(torch.float32).max / (FACTORS + 1))
    scale = (steps.amax(-1) / FACTORS).clamp_max(torch.finfo(dtype).max).to(dtype)
    factor = (steps / scale.float()[..., None].clamp_min(1e-30)).round().clamp(0, FACTORS).to(torch.uint8)
    return LevelGrid(scheme.encoding, scale, factor, scheme.group_size, widths.to(torch.uint8), parts)


def _refit(groups: Tensor, weight: Tensor, steps: Tensor, widths: Tensor) -> Tensor:
    """Least-squares steps for the levels of a table that are nearest now."""
    found = torch.empty_like(steps)
    for width in widths.unique().tolist():
        mine = widths == width
        table = torch.tensor(levels("table", width), dtype=torch.float32)
        part, step = groups[mine], steps[mine]
        bounds = (table[1:] + table[:-1]) / 2
        nearest = table[torch.bucketize(part / step.clamp_min(1e-30)[..., None], bounds)]
        shared = weight.expand_as(groups)[mine]
        square = (shared * nearest.square()).sum(-1)
        found[mine] = torch.where(square > 0, (shared * part * nearest).sum(-1) / square, step).clamp_min(0)
    return found


def nearest_codes(weights: Tensor, grid: LevelGrid) -> Tensor:
    """[matrices, out, in] codes with the least squared error, uint8.

    >>> widths = torch.full((1, 32), 2)
    >>> grid = fit_levels(torch.randn(1, 32, 64), Scheme(width=2, encoding="trellis"), widths, (32,))
    >>> nearest_codes(torch.randn(1, 32, 64), grid).max()
    tensor(3, dtype=torch.uint8)

    Args:
        weights: [matrices, out, in] float32.
        grid: of the weights.
    """
    n, _, features = weights.shape
    columns = Columns.of(weights, grid, torch.arange(features).expand(n, -1).contiguous(), None)
    kernels = find_grid_kernels(weights.device)
    for first in range(0, features, _BLOCK):
        kernels.round_columns(columns, columns.work[:, first : first + _BLOCK].contiguous(), first)
    return columns.integers.mT.contiguous()
