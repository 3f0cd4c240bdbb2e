"""Codes of a column in torch, on any device: the nearest levels of a table, and the best path through the trellis."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.levels import LevelGrid, levels

# divides values whose scale is 0, which stands for weights of 0: any other would do
_SMALLEST = 1.2e-38


def nearest_codes(values: Tensor, scale: Tensor, grid: LevelGrid) -> tuple[Tensor, Tensor]:
    """Codes with the least sum of squared errors for one column of some matrices.

    >>> grid = LevelGrid("table", torch.ones(3), torch.ones(3, 1), 64, torch.full((1, 3), 2), (3,))
    >>> nearest_codes(torch.tensor([[-60.0, 5.0, 70.0]]), torch.ones(1, 3), grid)[0]
    tensor([[0, 2, 3]])

    Args:
        values: [matrices, out] float32.
        scale: [matrices, out] value of one step of the levels, float32.
        grid: of the matrices.

    Returns:
        [matrices, out] codes, int64, and the weights that they stand for, float32.
    """
    codes, level = torch.zeros_like(values, dtype=torch.int64), torch.zeros_like(values)
    step, begin = torch.where(scale > 0, scale, _SMALLEST), 0
    for rows in grid.parts:
        part = slice(begin, begin := begin + rows)
        for width in grid.width[:, part.start].unique().tolist():
            mine = grid.width[:, part.start] == width
            found = torch.tensor(levels(grid.encoding, width), dtype=torch.float32, device=values.device)
            given = values[mine, part], step[mine, part], found
            chosen = _in_trellis(*given, grid.apart) if grid.encoding == "trellis" else _in_table(*given)
            codes[mine, part], level[mine, part] = chosen
    return codes, level * scale


def _in_table(values: Tensor, step: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.bucketize(values / step, (found[1:] + found[:-1]) / 2)
    return codes, found[codes].to(values.dtype)


def _in_trellis(values: Tensor, step: Tensor, found: Tensor, apart: int) -> tuple[Tensor, Tensor]:
    """The best path through a trellis whose ends meet, see `LevelGrid`."""
    value, there = _sequences(values, apart), _sequences(torch.ones_like(values), apart) > 0
    step = torch.where(there, _sequences(step, apart), 1.0)
    # for each parity the nearest of its levels
    offered = found.unflatten(0, (-1, 4))
    free = ((value / step)[..., None, None] > (offered[1:] + offered[:-1]) / 2).sum(-2)
    nearest = offered.gather(0, free.flatten(0, -2)).view(free.shape)
    error = torch.where(there[..., None], (value[..., None] - nearest * step[..., None]).square(), 0.0)
    states = torch.arange(4, device=values.device)
    coded, newest = states & 1, states >> 1

    # [..., state before all steps, state]: each of the four is tried
    cost = torch.full((4, 4), torch.inf, device=values.device).fill_diagonal_(0.0).expand(*value.shape[:-1], 4, 4)
    later = []
    for t in range(value.shape[-1]):
        offer = error[..., t, None, :]
        first = cost[..., newest] + offer[..., 2 * coded + newest]
        second = cost[..., 2 + newest] + offer[..., 2 * (1 - coded) + newest]
        later.append(second < first)
        cost = torch.where(second < first, second, first)
    # rows beyond the last have code 0
    cost = torch.where((coded == 1) & ~there[..., -1, None, None], torch.inf, cost)
    state = cost.diagonal(dim1=-2, dim2=-1).argmin(-1, keepdim=True)
    begin = state
    codes, chosen = torch.empty_like(value, dtype=torch.int64), torch.empty_like(value)
    for t in reversed(range(value.shape[-1])):
        older = later[t].flatten(-2).gather(-1, 4 * begin + state).long()
        parity = 2 * ((state & 1) ^ older) + (state >> 1)
        number = free[..., t, :].gather(-1, parity)
        codes[..., t] = (2 * number + (state & 1))[..., 0]
        chosen[..., t] = nearest[..., t, :].gather(-1, parity)[..., 0]
        state = (state >> 1) + 2 * older
    rows = values.shape[-1]
    return _rows(codes, rows), _rows(chosen, rows)


def _sequences(rows: Tensor, apart: int) -> Tensor:
    """[matrices, out] -> [matrices, apart, steps]: rows that are so far apart follow each other."""
    return pad(rows, (0, -rows.shape[-1] % apart)).unflatten(-1, (-1, apart)).mT


def _rows(sequences: Tensor, rows: int) -> Tensor:
    """The inverse of it."""
    return sequences.mT.flatten(-2)[..., :rows]
