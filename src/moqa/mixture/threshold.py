"""When to leave a prompt to the best single variant: chosen on texts that a router's training did not see."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.mixture.router import Router
from moqa.mixture.train import RouterSamples, chosen, confidences, fit, taken
from moqa.progress import Report

_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)  # the last one: never the router's choice
_TOLERATED = 0.01  # relative: intervals shrink with the share of routed prompts, and nearly none would be routed


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
        left_out: distribution -> relative change, against the best single variant, of what a router chooses that was
            trained without it; by their numbers.
    """

    router: Router
    threshold: float
    loss: float
    single: float
    oracle: float
    usage: tuple[float, ...]
    left_out: dict[int, float]


@dataclass(frozen=True)
class _Unseen:
    """What a router says of samples that its training did not see: [windows, cuts, variants] each."""

    loss: Tensor
    confidence: Tensor
    default: int

    def change(self, threshold: float) -> float:
        """Change of the mean loss by routing, relative to that of the best single variant."""
        return float(self._changes(threshold).mean())

    def loses(self, threshold: float) -> bool:
        """Whether that change is above what is tolerated, beyond its 95 % interval over windows."""
        each = self._changes(threshold)
        around = 1.96 * float(each.std()) / len(each) ** 0.5 if len(each) > 1 else 0.0
        return float(each.mean()) - around > _TOLERATED

    def _changes(self, threshold: float) -> Tensor:
        """[windows] changes, relative to the mean over all windows."""
        single = self.loss[..., self.default]
        routed = taken(self.loss, chosen(self.confidence, threshold, self.default))
        return (routed - single).mean(1) / single.mean().clamp_min(1e-12)


def train(
    kind: str, samples: RouterSamples, check: RouterSamples, *, default: int, seed: int, report: Report
) -> TrainedRouter:
    """Train a router of one kind, and choose the threshold of its confidence.

    >>> samples = RouterSamples.of(torch.randn(4, 64, 8), torch.rand(2, 4, 63), [2, 2])
    >>> train("linear", samples, samples, default=0, seed=0, report=report).threshold <= 1.01
    True

    A threshold that is best on held-out windows of known distributions says nothing about novel ones. So each
    distribution in turn is left out: a router that is trained on the others meets it as a novel one. Allowed are
    thresholds with which no such router loses more than 1 % against the best single variant beyond the 95 % interval
    of the paired differences; the one with the lowest loss on known and on left-out distributions together, which count
    alike, is kept. With a single distribution there is nothing to leave out, and held-out windows decide.

    Args:
        kind: name in `ROUTERS`.
        samples: to train on.
        check: held-out ones.
        default: index of the best single variant.
        seed: of the initial weights and the order.
        report: called per epoch.
    """
    router = fit(kind, samples, check, default=default, seed=seed, report=report)
    known = _Unseen(check.at_cuts, confidences(router, check), default)
    novel = _left_out(kind, samples, check, seed, report)
    threshold = _best_threshold(known, list(novel.values()))
    found = chosen(known.confidence, threshold, default)
    used = torch.bincount(found.flatten(), minlength=known.loss.shape[-1])
    return TrainedRouter(
        router, threshold, float(taken(known.loss, found).mean()), float(known.loss[..., default].mean()),
        float(known.loss.min(-1).values.mean()), tuple((used / used.sum()).tolist()),
        {number: trial.change(threshold) for number, trial in novel.items()},
    )  # fmt: skip


def _left_out(kind: str, samples: RouterSamples, check: RouterSamples, seed: int, report: Report) -> dict[int, _Unseen]:
    """Each distribution, met by a router that was trained on all others."""
    numbers = samples.distribution.unique().tolist()
    trials = {}
    for place, number in enumerate(numbers if len(numbers) > 1 else []):
        (others, mine), (held, also) = samples.split(number), check.split(number)
        default = int(held.at_cuts.mean((0, 1)).argmin())
        step = f"router without text {place + 1} of {len(numbers)}"
        router = fit(kind, others, held, default=default, seed=seed, report=report, step=step)
        both = (mine, also)
        trials[number] = _Unseen(
            torch.cat([part.at_cuts for part in both]), torch.cat([confidences(router, part) for part in both]), default
        )
    return trials


def _best_threshold(known: _Unseen, novel: Sequence[_Unseen]) -> float:
    allowed = [one for one in _THRESHOLDS if not any(trial.loses(one) for trial in novel)]

    def change(threshold: float) -> float:
        return known.change(threshold) + sum(trial.change(threshold) for trial in novel) / max(len(novel), 1)

    return min(reversed(allowed), key=change)  # of equally good ones the highest
