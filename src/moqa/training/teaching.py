"""What a student is taught: to predict as the original does."""

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.training.divergence import divergence, log_probabilities
from moqa.training.length import TrainingLength
from moqa.training.loop import step_seconds
from moqa.training.routing import Routes
from moqa.training.samples import TrainingSamples
from moqa.training.student import Student


class Teaching:
    """A student, and the loss by which it is trained: its divergence from the original's predictions.

    >>> Teaching(stages, samples, student).begin(TrainingLength(steps=8))["steps"]  # doctest: +SKIP
    8

    Args:
        stages: of the original.
        samples: with the original's answers.
        student: not yet in its place.
    """

    def __init__(self, stages: LayerwiseModel, samples: TrainingSamples, student: Student) -> None:
        self.stages, self.samples, self.student = stages, samples, student
        self._routes = Routes()
        with torch.no_grad(), self._routes.recorded(student.view, student.blocks):
            for _, inputs, _ in samples.held_batches():
                self._last_hidden(inputs)

    def loss(self, step: int) -> Tensor:
        """Divergence from the original on the samples of a step."""
        return self._divergence(*self.samples.drawn(step))

    @torch.no_grad()
    def held_out(self) -> tuple[float, float | None]:
        """Divergence on the samples that are held out, and the agreement of their routing with the original's."""
        batches, routes = self.samples.held_batches(), Routes()
        with routes.recorded(self.student.view, self.student.blocks):
            loss = sum(share * float(self._divergence(inputs, answers)) for share, inputs, answers in batches)
        return loss, self._routes.agreement(routes)

    def begin(self, wanted: TrainingLength) -> dict:
        """Number of steps, and what `held_out` says before them; timed once, so that a resumed run has as many."""
        before, routing = self.held_out()
        count = wanted.count(step_seconds(self.loss) if wanted.steps is None else 0.0)
        return {"steps": count, "before": before, "routing_before": routing}

    @torch.no_grad()
    def first_bad_block(self) -> str:
        """The first block whose outputs are not all numbers, on the samples of the first step."""
        with self.student.computing():
            hidden = self.stages.embed(self.samples.drawn(0)[0])
            for block in range(self.stages.depth):
                hidden = self.stages.run_block(block, hidden)
                if not bool(torch.isfinite(hidden).all()):
                    return f"block {block} has outputs that are none"
        return "only after its last steps, which were discarded"

    def _divergence(self, inputs: Tensor, answers: Tensor) -> Tensor:
        with torch.no_grad():  # by the original's head, outside of the student
            truth = log_probabilities(self.stages, answers)
        with self.student.computing():
            return divergence(truth, log_probabilities(self.stages, self._last_hidden(inputs)))

    def _last_hidden(self, inputs: Tensor) -> Tensor:
        hidden = self.stages.embed(inputs)
        for block in range(self.stages.depth):
            hidden = self.stages.run_block(block, hidden)
        return hidden
