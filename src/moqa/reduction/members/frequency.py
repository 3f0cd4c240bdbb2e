"""`frequency`: keep the experts that get most tokens."""

import torch
from torch import Tensor

from moqa.reduction.registry import DROPPED, Routed, reduction


@reduction("frequency")
def frequency(seen: Routed, count: int, seed: int) -> Tensor:  # noqa: ARG001
    """Keep the experts that get most tokens, drop the others; UNCURL's baseline."""
    return kept(seen.tokens.argsort(descending=True, stable=True)[:count], len(seen.tokens))


def kept(chosen: Tensor, experts: int) -> Tensor:
    """Groups of some experts alone, in their order.

    >>> kept(torch.tensor([3, 0]), 4).tolist()
    [0, -1, -1, 1]
    """
    groups = torch.full((experts,), DROPPED)
    groups[chosen.sort().values] = torch.arange(len(chosen))
    return groups
