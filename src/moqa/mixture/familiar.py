"""How like a prompt, or an image, is to those that a router was trained on."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_EPSILON = 1e-6


class Familiarity(nn.Module):
    """Tells known inputs from novel ones: the cosine between an input's mean and the nearest known distribution's.

    >>> known = Familiarity(2, 256)
    >>> known.see(torch.randn(8, 64, 256), torch.arange(8) % 2)
    >>> known(torch.randn(3, 256), tokens=64).shape
    torch.Size([3])

    Means are relative to that of all known distributions, in spreads of a token. A mean of few tokens is noisy in all
    directions, which alone would make a short prompt unlike everything; so the noise that is expected of so many
    tokens is taken off what does not lie along the distribution's direction.

    Args:
        distributions: that the router was trained on; of one, everything counts as familiar.
        features: numbers by which an input is known.
    """

    def __init__(self, distributions: int, features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.register_buffer("directions", torch.zeros(distributions, features))
        self.register_buffer("noise", torch.zeros(()))

    def see(self, samples: Tensor, of: Tensor) -> None:
        """Set all from [windows, tokens, features], and from [windows] the distribution of each, int64."""
        means = torch.stack([samples[of == number].mean((0, 1)) for number in range(len(self.directions))])
        self.centre: Tensor = means.mean(0)
        self.spread: Tensor = samples.flatten(0, 1).std(0).clamp_min(_EPSILON)
        self.directions: Tensor = normalize((means - self.centre) / self.spread, dim=-1)
        # of one token, in spreads: one for each feature. What an image is known by is no mean of many
        self.noise: Tensor = torch.tensor(float(samples.shape[-1]) if samples.shape[1] > 1 else 0.0)

    def forward(self, means: Tensor, tokens: Tensor | int) -> Tensor:
        """[...] familiarity from 0 to 1, from [..., features] means over so many tokens ([...] or one number)."""
        if len(self.directions) < 2:
            return torch.ones(means.shape[:-1])
        seen = (means - self.centre) / self.spread
        along = (seen @ self.directions.T).amax(-1)
        beside = (seen.square().sum(-1) - along.square() - self.noise / tokens).clamp_min(0)
        return along.clamp_min(0) / (along.square() + beside).sqrt().clamp_min(_EPSILON)
