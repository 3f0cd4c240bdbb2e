"""Train a router: the losses of the variants on continuations are its labels."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.mixture.measure import continuation
from moqa.mixture.router import ROUTERS, Router, stored
from moqa.progress import Report

# tokens of a prompt, and of its continuation, that a label needs
MIN_PROMPT, MIN_CONTINUATION = 8, 32
_BATCH, _EPOCHS = 32, 30
_CROP = 96  # tokens of a window in one step: what a step takes grows with their square, and prompts begin anywhere
_BALANCE = 0.02  # of the paper, falling to 0 in a straight line
_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)  # the last one: never the router's choice


@dataclass(frozen=True)
class RouterSamples:
    """What a router learns from.

    Attributes:
        features: [windows, context, features] of each token; [images, 1, channels, 32, 32] of images.
        loss: [variants, windows, context - 1] loss after prompts of 1, 2, ... tokens; [variants, images, 1] of images.
        cuts: of these, the lengths of prompts that count, as positions in `loss`.
    """

    features: Tensor
    loss: Tensor
    cuts: slice

    @classmethod
    def of(cls, features: Tensor, token_loss: Tensor) -> "RouterSamples":
        """From [variants, windows, context - 1] losses of each token, or [variants, images, 1] of images."""
        tokens = token_loss.shape[-1]
        half = max(tokens // 2, 1)
        cuts = slice(min(MIN_PROMPT, half) - 1, max(tokens - MIN_CONTINUATION, half))
        return cls(features, continuation(token_loss), cuts)

    def some(self, windows: Tensor) -> "RouterSamples":
        """Those of some windows."""
        return RouterSamples(self.features[windows], self.loss[:, windows], self.cuts)

    @property
    def at_cuts(self) -> Tensor:
        """[windows, cuts, variants] losses."""
        return self.loss[:, :, self.cuts].permute(1, 2, 0)


@dataclass(frozen=True)
class TrainedRouter:
    """A router, and what held-out samples say of it.

    Attributes:
        router: as it is stored.
        threshold: of its confidence, below which the best single variant is used.
        loss: of what it chooses, on held-out windows.
        single: of the best single variant.
        oracle: of the best variant of each.
        usage: share of prompts that each variant gets.
    """

    router: Router
    threshold: float
    loss: float
    single: float
    oracle: float
    usage: tuple[float, ...]


def train(
    kind: str, samples: RouterSamples, check: RouterSamples, *, default: int, seed: int, report: Report
) -> TrainedRouter:
    """Train a router of one kind.

    >>> samples = RouterSamples.of(torch.randn(4, 64, 8), torch.rand(2, 4, 63))
    >>> train("linear", samples, samples, default=0, seed=0, report=report).threshold <= 1.01
    True

    The target is a softmax over negative losses, relative to the mean gap between variants; prompts with a large gap
    weigh more. The balance term is the paper's: alpha (1 + sigma) N sum P F, alpha falling to 0. The epoch with the
    lowest held-out loss is kept, and so is the threshold of the confidence.

    Args:
        kind: name in `ROUTERS`.
        samples: to train on.
        check: held-out ones.
        default: index of the best single variant.
        seed: of the initial weights and the order.
        report: called per epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = ROUTERS.find(kind)(samples.features.shape[2], len(samples.loss))
        router.see(samples.features)
        targets, weights = soft_targets(samples.at_cuts)
        steps = _EPOCHS * -(-len(targets) // _BATCH)
        optimizer = torch.optim.AdamW(router.parameters(), lr=router.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, router.rate, steps, pct_start=0.1)
        best, kept, step = float("inf"), router, 0
        for epoch in range(_EPOCHS):
            router.train()
            for picked in torch.randperm(len(targets)).split(_BATCH):
                first = int(torch.randint(max(1, targets.shape[1] - _CROP // 2), ()))
                part = slice(first, first + _CROP)  # of the cuts; the tokens before the first are the shortest prompt
                seen = slice(first, samples.cuts.start + part.stop)
                logits = router(samples.features[picked, seen])[:, samples.cuts.start :]
                wanted, weight = targets[picked, part], weights[picked, part]
                loss = _loss(logits[:, : wanted.shape[1]], wanted, weight, alpha=_BALANCE * (1 - step / steps))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
            candidate = _as_stored(router)
            routed = float(routed_loss(candidate, check, 0.0, default).mean())
            if routed < best:
                best, kept = routed, candidate
            report("router", epoch + 1, _EPOCHS, loss=routed)
    return _judged(kept, check, default)


def soft_targets(loss: Tensor) -> tuple[Tensor, Tensor]:
    """[..., variants] targets that sum to 1, and [...] weights whose mean is 1, from [..., variants] losses.

    >>> soft_targets(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))[1]
    tensor([2., 0.])
    """
    gap = loss.max(-1).values - loss.min(-1).values
    mean = gap.mean().clamp_min(1e-12)
    return torch.softmax(-4 * loss / mean, -1), gap / mean


@torch.no_grad()
def probabilities(router: Router, samples: RouterSamples) -> Tensor:
    """[windows, cuts, variants] what a router says at the cuts."""
    parts = [router(part)[:, samples.cuts].softmax(-1) for part in samples.features.split(_BATCH)]
    return torch.cat(parts)


def routed_loss(router: Router, samples: RouterSamples, threshold: float, default: int) -> Tensor:
    """[windows, cuts] losses of the variants that a router chooses."""
    return _taken(samples.at_cuts, chosen(probabilities(router, samples), threshold, default))


def chosen(shares: Tensor, threshold: float, default: int) -> Tensor:
    """[...] index of the variant of each prompt, from [..., variants] probabilities."""
    confidence, index = shares.max(-1)
    return torch.where(confidence >= threshold, index, default)


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


def _judged(router: Router, check: RouterSamples, default: int) -> TrainedRouter:
    loss, shares = check.at_cuts, probabilities(router, check)
    found: Sequence[float] = [float(_taken(loss, chosen(shares, t, default)).mean()) for t in _THRESHOLDS]
    at = min(range(len(found)), key=lambda index: found[index])
    used = torch.bincount(chosen(shares, _THRESHOLDS[at], default).flatten(), minlength=loss.shape[-1])
    return TrainedRouter(
        router, _THRESHOLDS[at], found[at], float(loss[..., default].mean()), float(loss.min(-1).values.mean()),
        tuple((used / used.sum()).tolist()),
    )  # fmt: skip


def _taken(loss: Tensor, index: Tensor) -> Tensor:
    return loss.gather(-1, index[..., None])[..., 0]
