"""Inputs of single experts, gathered from the calls of all experts of a block."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moqa.models.products import filled_up, in_blocks

# inputs that are gathered at a time; more if a single call has more, because an expert may get all tokens
GATHERED_ROWS = 2**11

# a call, the weight of its squares, the rows that an expert got, and which of their top-k choices it was
_Place = tuple[Mapping[str, Tensor], float, Tensor, Tensor]


def routed(
    expert: int, calls: Sequence[tuple[float, Mapping[str, Tensor]]], affinity: float = 1.0
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """An expert's inputs, many at a time.

    >>> call = {"x": torch.randn(6, 8), "index": torch.zeros(6, 1, dtype=torch.int64), "gate": torch.ones(6, 1)}
    >>> [(x.shape, gate.shape, tokens) for x, gate, tokens in routed(0, [(1.0, call)])]
    [(torch.Size([64, 8]), torch.Size([64, 1]), 6)]

    Args:
        expert: its index.
        calls: weight of the squares, and a call: `x` [tokens, in], `index` and `gate` [tokens, choices].
        affinity: power of the gates.

    Returns:
        [rows, in] inputs, float32; [rows, 1] the powers of their gates times the root of the weight; and the number of
        inputs: the rows after them are zeros.
    """
    waiting: list[_Place] = []
    count = 0
    for share, call in calls:
        rows, choice = (call["index"] == expert).nonzero(as_tuple=True)
        if waiting and count + len(rows) > GATHERED_ROWS:
            yield from _gathered(waiting, count, affinity)
            waiting, count = [], 0
        if len(rows):
            waiting.append((call, share, rows, choice))
            count += len(rows)
    if count:
        yield from _gathered(waiting, count, affinity)


def _gathered(places: Sequence[_Place], tokens: int, affinity: float) -> Iterator[tuple[Tensor, Tensor, int]]:
    filled = filled_up(tokens)
    x = torch.empty(filled, places[0][0]["x"].shape[-1])
    gate = torch.zeros(filled, 1)
    begin = 0
    for call, share, rows, choice in places:
        end = begin + len(rows)
        torch.index_select(call["x"], 0, rows, out=x[begin:end])
        gates = call["gate"][rows, choice]
        gate[begin:end, 0] = (gates if affinity == 1 else gates.pow(affinity)) * share**0.5
        begin = end
    x[begin:] = 0
    for block in in_blocks(filled):
        yield x[block], gate[block], min(block.stop, tokens) - block.start
