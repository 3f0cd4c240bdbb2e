"""Experts that become one: their neurons in one order, their weights averaged by the tokens that they get."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class ExpertMatrices:
    """The matrices of one expert.

    Attributes:
        gate: [width, features].
        up: [width, features].
        down: [features, width].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def neurons(self) -> Tensor:
        """[width, 3 * features] of each neuron its row of `gate`, its row of `up` and its column of `down`, each of
        length 1."""
        return torch.cat([normalize(part, dim=1) for part in (self.gate, self.up, self.down.T)], dim=1)

    def in_order(self, order: Tensor) -> "ExpertMatrices":
        """The same function with its neurons in another order."""
        return ExpertMatrices(self.gate[order], self.up[order], self.down[:, order])


def merged(experts: Sequence[ExpertMatrices], tokens: Tensor) -> ExpertMatrices:
    """One expert for several: their mean, weighted by tokens, after their neurons are aligned to the most used one.

    >>> one = ExpertMatrices(torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8))
    >>> same = merged([one, one.in_order(torch.randperm(8))], torch.tensor([3, 1]))
    >>> torch.allclose(same.gate, one.gate)
    True

    Args:
        experts: float32.
        tokens: [experts] that each expert gets; if none gets any, all weigh the same.

    UNCURL (arXiv 2409.01483): permutation alignment, then merging by activation.
    """
    shares = tokens.double() if int(tokens.sum()) else torch.ones(len(experts)).double()
    shares = shares / shares.sum()
    lead = experts[int(shares.argmax())]
    aligned = [expert if expert is lead else expert.in_order(alignment(lead, expert)) for expert in experts]

    def mean(name: str) -> Tensor:
        parts = (share * getattr(expert, name).double() for share, expert in zip(shares, aligned, strict=True))
        return torch.stack(list(parts)).sum(0).float()

    return ExpertMatrices(mean("gate"), mean("up"), mean("down"))


def alignment(lead: ExpertMatrices, other: ExpertMatrices) -> Tensor:
    """[width] for each neuron of `lead` the one of `other` that it is matched with, by the largest sum of cosines."""
    from scipy.optimize import linear_sum_assignment

    alike = lead.neurons() @ other.neurons().T
    return torch.from_numpy(linear_sum_assignment(alike.numpy(), maximize=True)[1])
