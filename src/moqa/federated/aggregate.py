"""Updates of many clients as one: the weighted mean, or one that a few bad clients cannot move far."""

import math
from collections.abc import Mapping, Sequence

import torch

from moqa.errors import MoqaError
from moqa.federated.updates import State


def combine(updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], trim: float = 0.0) -> State:
    """One update from those of a round.

    >>> combine([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])["w"]
    tensor([2.])
    >>> combine([{"w": torch.tensor([x])} for x in (1.0, 2.0, 900.0)], [1, 1, 1], trim=0.3)["w"]
    tensor([2.])

    Args:
        updates: of the clients, with equal names and shapes.
        weights: numbers of their samples.
        trim: share of the clients that may be bad. Of every number, so many of the smallest and of the largest are left
            out, and clients count alike, as a number of samples may be a lie; 0 is the weighted mean (FedAvg).

    Raises:
        MoqaError: if trimming leaves no client.

    Yin, Chen, Ramchandran, Bartlett: Byzantine-robust distributed learning (ICML 2018), option II.
    """
    cut = math.ceil(trim * len(updates)) if trim else 0
    if 2 * cut >= len(updates):
        raise MoqaError(f"trim={trim} leaves none of {len(updates)} updates", "give less than half of the clients")
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum()).float()
    found = State()
    for name, first in updates[0].items():
        stack = torch.stack([update[name].float() for update in updates])
        if cut:
            mean = stack.sort(0).values[cut : len(updates) - cut].mean(0)
        else:
            mean = torch.einsum("c,c...->...", shares, stack)
        found[name] = mean if first.is_floating_point() else mean.round().to(first.dtype)
    return found
