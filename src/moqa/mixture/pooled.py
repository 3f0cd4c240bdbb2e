"""The two cheap routers: one linear map of the mean of what was read so far."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moqa.mixture.router import ROUTERS, Reads, Router, causal_mean


class LinearRouter(Router):
    """A linear map of the mean embedding row of the prompt."""

    reads: ClassVar[Reads] = "rows"
    rate: ClassVar[float] = 2e-2

    def __init__(self, features: int, variants: int) -> None:
        super().__init__(features, variants)
        self.map = nn.Linear(features, variants)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def see(self, samples: Tensor) -> None:
        """See `Router`."""
        pooled = causal_mean(samples)[:, 8:].flatten(0, 1)
        self.mean: Tensor = pooled.mean(0)
        self.spread: Tensor = pooled.std(0).clamp_min(1e-6)

    def encode(self, features: Tensor) -> Tensor:
        """See `Router`."""
        return features

    def answer(self, pooled: Tensor) -> Tensor:
        """See `Router`."""
        out: Tensor = self.map((pooled - self.mean) / self.spread)
        return out


class HistogramRouter(LinearRouter):
    """A linear map of how often the prompt's tokens are routed to each expert, which a model counts anyway."""

    reads: ClassVar[Reads] = "routing"


ROUTERS["linear"] = LinearRouter
ROUTERS["histogram"] = HistogramRouter
