"""The loop of a training: steps of an optimizer, saved so that a training that was killed goes on byte for byte."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moqa.progress import Report
from moqa.storage.resumable import ResumableRun
from moqa.training.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from moqa.training.optimizers.state import put_together, taken_apart

# share of the steps in which the rate rises; then it falls by half a cosine
_WARM_UP = 0.05
_SAVE_EVERY = 10
# steps by which the time of one is measured
_TIMED = 3


class NotFiniteError(Exception):
    """The loss of a step is not a number."""


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        parameters: all of about the same size.
        loss: of a step, with gradients.
        steps: of the optimizer.
        rate: largest learning rate.
        name: of what is saved.
        optimizer: name of a registered one.
    """

    parameters: list[nn.Parameter]
    loss: Callable[[int], Tensor]
    steps: int
    rate: float
    name: str = "training"
    optimizer: str = DEFAULT_OPTIMIZER

    def run(self, work: ResumableRun, report: Report) -> None:
        """Train, going on after the last saved step.

        Raises:
            NotFiniteError: if a loss is not a number; the parameters are those of the last step that was saved.
        """
        optimizers = OPTIMIZERS.find(self.optimizer).make(self.parameters, self.rate)
        done = self._restored(work, optimizers)
        mean = None
        for step in range(done, self.steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * scheduled(step, self.steps)
            loss = self.loss(step)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._restored(work, optimizers)
                raise NotFiniteError(f"step {step + 1} of {self.steps}")
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            mean = value if mean is None else 0.9 * mean + 0.1 * value
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == self.steps:
                self._save(work, optimizers, step + 1)
            report("recover", step + 1, self.steps, loss=mean)

    def _save(self, work: ResumableRun, optimizers: list[Optimizer], step: int) -> None:
        trained = {f"parameter-{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        tensors, rest = taken_apart(optimizers)
        work.save(f"{self.name}-{step}", trained | tensors)
        before = work.done(self.name)
        work.mark_done(self.name, {"step": step, "optimizers": rest})
        if before is not None and before["step"] != step:
            work.remove(f"{self.name}-{before['step']}")

    @torch.no_grad()
    def _restored(self, work: ResumableRun, optimizers: list[Optimizer]) -> int:
        """Load the last saved step, or the beginning; returns its number."""
        done = work.done(self.name)
        if done is None:
            for parameter in self.parameters:
                parameter.zero_()
            return 0
        saved = work.load(f"{self.name}-{done['step']}")
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(saved[f"parameter-{number}"])
        put_together(optimizers, saved, done["optimizers"])
        return int(done["step"])


def step_seconds(loss: Callable[[int], Tensor]) -> float:
    """Time of a step with its gradients, from a few.

    >>> step_seconds(lambda step: torch.ones((), requires_grad=True) * step) > 0
    True
    """
    began = time.perf_counter()
    for step in range(_TIMED):
        loss(step).backward()
    return (time.perf_counter() - began) / _TIMED


def scheduled(step: int, steps: int) -> float:
    """Rate of a step, relative to the largest: it rises, then falls by half a cosine.

    >>> [round(scheduled(step, 100), 2) for step in (0, 4, 50, 99)]
    [0.2, 1.0, 0.5, 0.0]
    """
    warm = max(1.0, _WARM_UP * steps)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
