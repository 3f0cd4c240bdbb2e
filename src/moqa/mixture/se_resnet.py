"""The router of images: a small residual net with squeeze and excitation."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from moqa.mixture.router import ROUTERS, Reads, Router

WIDTHS, SQUEEZE, PARTS = (8, 16, 32), 4, 4  # channels of the blocks, their share, parts of a norm


class SeResNetRouter(Router):
    """A convolution, three residual blocks of two with squeeze and excitation, and a linear map: eight layers.

    MoQE (arXiv 2508.09204, section 3) names an SE-ResNet-8 and not its sizes, which are ours, as are norms over parts
    of the channels: they need no statistics of other images.
    """

    reads: ClassVar[Reads] = "pixels"
    rate: ClassVar[float] = 3e-3
    known_by_encoded: ClassVar[bool] = True

    def __init__(self, features: int, variants: int) -> None:
        super().__init__(features, variants)
        self.register_buffer("mean", torch.zeros(features, 1, 1))
        self.register_buffer("spread", torch.ones(features, 1, 1))
        self.stem = nn.Conv2d(features, WIDTHS[0], 3, stride=2, padding=1)
        inputs = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.Sequential(
            *(_SqueezedBlock(i, o, stride=1 if i == o else 2) for i, o in zip(inputs, WIDTHS, strict=False))
        )
        self.map = nn.Linear(WIDTHS[-1], variants)

    def see(self, samples: Tensor) -> None:
        """See `Router`."""
        self.mean: Tensor = samples.mean((0, 1, 3, 4))[:, None, None]
        self.spread: Tensor = samples.std((0, 1, 3, 4))[:, None, None].clamp_min(1e-6)

    def encode(self, features: Tensor) -> Tensor:
        """See `Router`."""
        images = (features.flatten(0, 1) - self.mean) / self.spread
        found: Tensor = self.blocks(self.stem(images)).mean((-2, -1))
        return found.unflatten(0, features.shape[:2])

    def answer(self, pooled: Tensor) -> Tensor:
        """See `Router`."""
        out: Tensor = self.map(pooled)
        return out


class _SqueezedBlock(nn.Module):
    """Two convolutions beside a shortcut; each channel of their sum is weighted by what all channels hold (SENet)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(PARTS, count) for count in (inputs, outputs))
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.excite = nn.Sequential(
            nn.Linear(outputs, outputs // SQUEEZE), nn.ReLU(), nn.Linear(outputs // SQUEEZE, outputs), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[images, inputs, height, width] -> [images, outputs, height / stride, width / stride]."""
        hidden = self.second(relu(self.norms[1](self.first(relu(self.norms[0](x))))))
        out: Tensor = self.shortcut(x) + hidden * self.excite(hidden.mean((-2, -1)))[..., None, None]
        return out


ROUTERS["se-resnet"] = SeResNetRouter
