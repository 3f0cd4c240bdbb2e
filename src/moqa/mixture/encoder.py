"""The router that reads a prompt in its order: a small causal transformer over frozen embedding rows."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moqa.mixture.router import ROUTERS, Reads, Router

WIDTH, HEADS, BLOCKS, DROPOUT = 32, 4, 2, 0.1


class EncoderRouter(Router):
    """Projection, causal transformer blocks, the mean of their outputs so far, and an MLP (after MoQE, section 3).

    The released code of the paper lets each position see the whole text, the predicted token included; here a causal
    mask and a causal mean make that impossible. There are no positions: what a prompt is about does not depend on them.
    """

    reads: ClassVar[Reads] = "rows"
    rate: ClassVar[float] = 2e-3

    def __init__(self, features: int, variants: int) -> None:
        super().__init__(features, variants)
        self.register_buffer("scale", torch.ones(()))
        self.project = nn.Linear(features, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH // 2), nn.GELU(), nn.Linear(WIDTH // 2, variants))

    def see(self, samples: Tensor) -> None:
        """See `Router`."""
        self.scale: Tensor = 1 / samples.std().clamp_min(1e-6)

    def encode(self, features: Tensor) -> Tensor:
        """See `Router`."""
        mask = nn.Transformer.generate_square_subsequent_mask(features.shape[1])
        out: Tensor = self.blocks(self.project(features * self.scale), mask=mask, is_causal=True)
        return out

    def answer(self, pooled: Tensor) -> Tensor:
        """See `Router`."""
        out: Tensor = self.head(pooled)
        return out


ROUTERS["encoder"] = EncoderRouter
