"""Train a router: the losses of the variants on continuations are its labels."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.mixture.familiar import Familiarity
from moqa.mixture.measure import continuation
from moqa.mixture.router import ROUTERS, Router, stored
from moqa.progress import Report

# tokens of a prompt, and of its continuation, that a label needs
MIN_PROMPT, MIN_CONTINUATION = 8, 32
_BATCH, _EPOCHS = 32, 30
_CROP = 96  # tokens of a window in one step: what a step takes grows with their square, and prompts begin anywhere
_BALANCE = 0.02  # of the paper, falling to 0 in a straight line


@dataclass(frozen=True)
class RouterSamples:
    """What a router learns from.

    Attributes:
        features: [windows, context, features] of each token; [images, 1, channels, 32, 32] of images.
        loss: [variants, windows, context - 1] loss after prompts of 1, 2, ... tokens; [variants, images, 1] of images.
        distribution: [windows] number of the distribution that each is of, int64.
        cuts: of these, the lengths of prompts that count, as positions in `loss`.
    """

    features: Tensor
    loss: Tensor
    distribution: Tensor
    cuts: slice

    @classmethod
    def of(cls, features: Tensor, token_loss: Tensor, counts: Sequence[int]) -> "RouterSamples":
        """From [variants, windows, context - 1] losses of each token, or [variants, images, 1] of images.

        Args:
            features: see the class.
            token_loss: see above.
            counts: windows of each distribution, which follow each other.
        """
        tokens = token_loss.shape[-1]
        half = max(tokens // 2, 1)
        cuts = slice(min(MIN_PROMPT, half) - 1, max(tokens - MIN_CONTINUATION, half))
        numbers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return cls(features, continuation(token_loss), numbers, cuts)

    def some(self, windows: Tensor) -> "RouterSamples":
        """Those of some windows."""
        return RouterSamples(self.features[windows], self.loss[:, windows], self.distribution[windows], self.cuts)

    def split(self, number: int) -> "tuple[RouterSamples, RouterSamples]":
        """Those of all other distributions, and those of one."""
        return self.some(self.distribution != number), self.some(self.distribution == number)

    @property
    def at_cuts(self) -> Tensor:
        """[windows, cuts, variants] losses."""
        return self.loss[:, :, self.cuts].permute(1, 2, 0)


def fit(
    kind: str, samples: RouterSamples, check: RouterSamples, *, default: int, seed: int, report: Report,
    step: str = "router",
) -> Router:  # fmt: skip
    """A router of one kind, as its file will hold it.

    >>> samples = RouterSamples.of(torch.randn(4, 64, 8), torch.rand(2, 4, 63), [2, 2])
    >>> fit("linear", samples, samples, default=0, seed=0, report=report).after(torch.randn(1, 9, 8)).shape
    torch.Size([1, 2])

    The target is a softmax over negative losses, relative to the mean gap between variants; prompts with a large gap
    weigh more. The balance term is the paper's: alpha (1 + sigma) N sum P F, alpha falling to 0. The epoch with the
    lowest held-out loss is kept.

    Args:
        kind: name in `ROUTERS`.
        samples: to train on.
        check: held-out ones.
        default: index of the best single variant.
        seed: of the initial weights and the order.
        report: called per epoch.
        step: name of this work in reports.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = ROUTERS.find(kind)(samples.features.shape[2], len(samples.loss))
        router.see(samples.features)
        targets, weights = soft_targets(samples.at_cuts)
        steps = _EPOCHS * -(-len(targets) // _BATCH)
        optimizer = torch.optim.AdamW(router.parameters(), lr=router.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, router.rate, steps, pct_start=0.1)
        best, kept, number = float("inf"), router, 0
        for epoch in range(_EPOCHS):
            router.train()
            for picked in torch.randperm(len(targets)).split(_BATCH):
                first = int(torch.randint(max(1, targets.shape[1] - _CROP // 2), ()))
                part = slice(first, first + _CROP)  # of the cuts; the tokens before the first are the shortest prompt
                seen = slice(first, samples.cuts.start + part.stop)
                logits = router(samples.features[picked, seen])[:, samples.cuts.start :]
                wanted, weight = targets[picked, part], weights[picked, part]
                loss = _loss(logits[:, : wanted.shape[1]], wanted, weight, alpha=_BALANCE * (1 - number / steps))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                number += 1
            candidate = _as_stored(router)
            routed = float(taken(check.at_cuts, chosen(confidences(candidate, check), 0.0, default)).mean())
            if routed < best:
                best, kept = routed, candidate
            report(step, epoch + 1, _EPOCHS, loss=routed)
    return _as_stored(_familiar(kept, samples))


def soft_targets(loss: Tensor) -> tuple[Tensor, Tensor]:
    """[..., variants] targets that sum to 1, and [...] weights whose mean is 1, from [..., variants] losses.

    >>> soft_targets(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))[1]
    tensor([2., 0.])
    """
    gap = loss.max(-1).values - loss.min(-1).values
    mean = gap.mean().clamp_min(1e-12)
    return torch.softmax(-4 * loss / mean, -1), gap / mean


@torch.no_grad()
def confidences(router: Router, samples: RouterSamples) -> Tensor:
    """[windows, cuts, variants] confidence of a router at the cuts."""
    return torch.cat([router.confidences(part)[:, samples.cuts] for part in samples.features.split(_BATCH)])


def chosen(shares: Tensor, threshold: float, default: int) -> Tensor:
    """[...] index of the variant of each prompt, from [..., variants] confidences."""
    confidence, index = shares.max(-1)
    return torch.where(confidence >= threshold, index, default)


def taken(loss: Tensor, index: Tensor) -> Tensor:
    """[...] losses of the chosen variants, from [..., variants] losses and [...] indices."""
    return loss.gather(-1, index[..., None])[..., 0]


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, alpha: float) -> Tensor:
    fit = (-(targets * logits.log_softmax(-1)).sum(-1) * weights).mean()
    shares, variants = logits.softmax(-1).flatten(0, -2), logits.shape[-1]
    used = torch.bincount(shares.argmax(-1), minlength=variants) / len(shares)
    sigma = float(used.std(correction=0) / used.mean())
    return fit + alpha * (1 + sigma) * variants * (shares.mean(0) * used).sum()


def _as_stored(router: Router) -> Router:
    """A copy with the weights that its file will hold."""
    copied = copy.deepcopy(router).eval()
    copied.load_state_dict({name: tensor.float() for name, tensor in stored(router).items()})
    return copied


@torch.no_grad()
def _familiar(router: Router, samples: RouterSamples) -> Router:
    """The router, which can tell what it was trained on."""
    parts = samples.features.split(_BATCH)
    seen = torch.cat([router.evidence(part, router.encode(part)) for part in parts])
    numbers = samples.distribution.unique(return_inverse=True)[1]
    router.familiar = Familiarity(int(numbers.max()) + 1, seen.shape[-1])
    router.familiar.see(seen, numbers)
    return router
