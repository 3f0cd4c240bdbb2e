"""The samples of a training, with what the original predicts for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.models.layerwise import LayerwiseModel
from moqa.progress import Report
from moqa.quantization.samples import held_out
from moqa.storage.in_memory import InMemoryRun
from moqa.tasks import Task

# predictions in one step, and most samples
_PREDICTIONS, _SAMPLES = 2048, 64
# more than any training has: seeds of different trainings share no step
_STEPS = 2**31


@dataclass(frozen=True)
class Answered:
    """Samples of one distribution.

    Attributes:
        share: of the distribution in the loss.
        inputs: what the model is called with, e.g. [windows, context] token ids.
        answers: the original's outputs of its last block, e.g. [windows, context, features].
    """

    share: float
    inputs: Tensor
    answers: Tensor


class TrainingSamples:
    """Samples to train on, and some that are held out from it.

    >>> samples = TrainingSamples(stages, {"wiki": tokens}, {"wiki": 1.0}, seed=0, report=report)
    >>> inputs, answers = samples.drawn(step=0)

    Args:
        stages: of the original.
        samples: distribution -> what the model is called with.
        mixture: distribution -> its share.
        seed: of the order.
        report: called per block.

    Attributes:
        fitted: by distribution.
        held: by distribution; empty where one has a single sample.
    """

    def __init__(
        self,
        stages: LayerwiseModel,
        samples: Mapping[str, Tensor],
        mixture: Mapping[str, float],
        *,
        seed: int,
        report: Report,
    ) -> None:
        self.fitted: dict[str, Answered] = {}
        self.held: dict[str, Answered] = {}
        parts = list(_parted(samples, mixture))
        for number, (name, is_held, part) in enumerate(parts):
            report("original", number, len(parts))
            answered = self.held if is_held else self.fitted
            answered[name] = Answered(mixture[name], part, _answers(stages, part))
        report("original", len(parts), len(parts))
        self._stages, self._seed = stages, seed
        self._together = _together(stages.task, next(iter(self.fitted.values())).inputs)

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and answers of a step, drawn from the mixture; the same for the same step."""
        generator = seeded(self._seed, step)
        known = list(self.fitted.values())
        shares = torch.tensor([one.share for one in known])
        chosen = torch.multinomial(shares, self._together, replacement=True, generator=generator).tolist()
        at = [(known[one], int(torch.randint(len(known[one].inputs), (), generator=generator))) for one in chosen]
        return torch.stack([one.inputs[i] for one, i in at]), torch.stack([one.answers[i] for one, i in at])

    def held_batches(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """All held-out samples in batches: the share of each in the whole mixture, inputs and answers."""
        for one in self.held.values():
            size = one.share / self._stages.task.count(one.inputs)
            for inputs, answers in zip(
                *(part.split(self._together) for part in (one.inputs, one.answers)), strict=True
            ):
                yield size * self._stages.task.count(inputs), inputs, answers


@dataclass(frozen=True)
class Batch:
    """Samples of one distribution that are used together.

    Attributes:
        share: in the whole mixture; of those that are held out, and of the others, shares sum to 1.
        inputs: what the model is called with.
        held: whether they are held out from the training.
    """

    share: float
    inputs: Tensor
    held: bool


def batched(task: Task, samples: Mapping[str, Tensor], mixture: Mapping[str, float]) -> Iterator[Batch]:
    """The samples of a mixture in batches of one step's size.

    >>> [batch.held for batch in batched(view.task, {"wiki": torch.zeros(9, 16, dtype=torch.long)}, {"wiki": 1.0})]
    [False, True]

    Args:
        task: of the model.
        samples: distribution -> what the model is called with.
        mixture: distribution -> its share.
    """
    parts = list(_parted(samples, mixture))
    for name, is_held, part in parts:
        whole = sum(mixture[other] for other, held, _ in parts if held == is_held)
        for inputs in part.split(_together(task, part)):
            yield Batch(mixture[name] / whole * len(inputs) / len(part), inputs, is_held)


def seeded(seed: int, step: int) -> torch.Generator:
    """What a step of a training draws its samples with.

    >>> seeded(1, 2).initial_seed() == seeded(1, 2).initial_seed()
    True
    """
    return torch.Generator().manual_seed(seed * _STEPS + step)


def _parted(samples: Mapping[str, Tensor], mixture: Mapping[str, float]) -> Iterator[tuple[str, bool, Tensor]]:
    """Distributions, whether a part of their samples is held out, and the part."""
    # sorted, so that a mixture that was read from a file has the same order
    for name in sorted(mixture):
        check = held_out(len(samples[name]))
        for is_held, part in ((False, samples[name][~check]), (True, samples[name][check])):
            if len(part):
                yield name, is_held, part


def _together(task: Task, inputs: Tensor) -> int:
    """Samples of a step."""
    return max(1, min(_PREDICTIONS // task.count(inputs[:1]), _SAMPLES))


@torch.no_grad()
def _answers(stages: LayerwiseModel, inputs: Tensor) -> Tensor:
    hidden = HiddenStates(stages, InMemoryRun(), "answers", stages.task.batches(inputs))
    for layer in range(stages.depth):
        hidden.advance(layer, keep=False)
    return torch.cat([hidden.at(stages.depth, number) for number in range(len(hidden))])
