"""Training of a model that does not fit the memory: one block after the other."""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.calibration.outputs import Gradients
from moqa.format.manifest import Recovery
from moqa.format.reader import Checkpoint
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView
from moqa.profiling import Profile
from moqa.progress import Fact, Report
from moqa.storage.resumable import ResumableRun
from moqa.training.divergence import divergence, log_probabilities
from moqa.training.length import TrainingLength
from moqa.training.loop import NotFiniteError, Training, step_seconds
from moqa.training.optimizers import DEFAULT_OPTIMIZER
from moqa.training.routing import Routes
from moqa.training.samples import batched, seeded
from moqa.training.student import IN_THE_LOOP, InTheLoop, Student


class BlockwiseTraining:
    """Trains the blocks of a checkpoint, each to give the hidden states that the original has after it.

    >>> training = BlockwiseTraining(view, checkpoint, profile, work, seed=0, report=report)  # doctest: +SKIP
    >>> training.run(TrainingLength(steps=2), rate=2e-3).blockwise  # doctest: +SKIP
    True

    A block's inputs are those that it has in the checkpoint, whose earlier blocks are trained already. An error at its
    outputs counts by the gradients of the loss there, if the profile has them, and else by its square. A block that is
    not better on held-out samples stays as it was. Every finished block is on the disk.

    Training by blocks before the whole model is the first phase of EfficientQAT (arXiv 2407.11062); there every error
    counts by its square, and integers are trained, too.

    Args:
        view: the original, whose blocks are read when they are used.
        packed: the checkpoint.
        profile: that it was made from.
        work: where finished blocks and hidden states are.
        seed: of the order of the samples.
        report: called per step.
        optimizer: name of a registered one.
        loop: what else is trained or rounded.
    """

    def __init__(
        self, view: ModelView, packed: Checkpoint, profile: Profile, work: ResumableRun, *, seed: int, report: Report,
        optimizer: str = DEFAULT_OPTIMIZER, loop: InTheLoop = IN_THE_LOOP,
    ) -> None:  # fmt: skip
        self._view, self._packed, self._profile, self._work = view, packed, profile, work
        self._optimizer, self._loop = optimizer, loop
        self._seed, self._report, self._stages = seed, report, LayerwiseModel(view.model)
        mixture = packed.manifest.mixture
        batches = list(batched(self._stages.task, {name: profile.samples(name) for name in mixture}, mixture))
        self._shares = [batch.share for batch in batches]
        self._fitted = [number for number, batch in enumerate(batches) if not batch.held]
        self._held = [number for number, batch in enumerate(batches) if batch.held]
        inputs = [batch.inputs for batch in batches]
        # of the original, of the checkpoint as it is trained, and of the checkpoint as it was
        self._original, self._trained, self._before = (
            HiddenStates(self._stages, work, name, inputs) for name in ("original", "trained", "before")
        )

    def run(self, wanted: TrainingLength, rate: float) -> Recovery:
        """Train every block that is not finished yet.

        Args:
            wanted: length of the whole training; a number of steps is that of each block.
            rate: largest learning rate.
        """
        depth = self._stages.depth
        for block in range(depth):
            if self._work.done(_note(block)) is None:
                self._train(block, wanted, rate)
        before, after = self._divergence(self._before), self._divergence(self._trained)
        notes = [self._work.done(_note(block)) or {} for block in range(depth)]
        return Recovery(
            steps=(self._work.done("length") or {"steps": 0})["steps"], before=before, after=after,
            kept=after < before, blockwise=True, optimizer=self._optimizer, **self._loop.chosen(),
            routing_before=_mean(note["routing_before"] for note in notes),
            routing_after=_mean(note["routing_after"] for note in notes),
        )  # fmt: skip

    def stored(self, block: int | None) -> Mapping[str, Tensor]:
        """Trained tensors of a block's units, or the kept ones of all if `block` is None, as a shard has them."""
        if block is not None:
            return self._work.load(f"units-{block}")
        each = (self._work.load(f"kept-{number}") for number in range(self._stages.depth))
        return {name: tensor for kept in each for name, tensor in kept.items()}

    def _train(self, block: int, wanted: TrainingLength, rate: float) -> None:
        work, original = self._work, self._advance(self._original, block, self._fitted)
        student = Student(self._view, self._packed, block, self._loop)
        with student.in_place():
            before = self._advance(self._before, block)
            if not self._improve(block, student, wanted, rate):
                student.start_again()
            with student.computing():
                after = self._advance(self._trained, block, self._fitted)
        work.save(f"units-{block}", student.stored(block))
        work.save(f"kept-{block}", student.stored(None))
        routing = {"routing_before": original.agreement(before), "routing_after": original.agreement(after)}
        work.mark_done(_note(block), routing)
        for states in (self._original, self._trained, self._before):
            states.forget(block)
        work.remove(f"{_training(block)}-*")

    def _improve(self, block: int, student: Student, wanted: TrainingLength, rate: float) -> bool:
        """Train a block that is in its place; returns whether held-out samples say that it is better."""
        gradients = self._profile.gradients(block, self._packed.manifest.mixture)
        shares = torch.tensor([self._shares[number] for number in self._fitted])

        def loss(number: int) -> Tensor:
            with student.computing():
                found = self._stages.run_block(block, self._trained.at(block, number))
            return _error(found, self._original.at(block + 1, number), gradients)

        def loss_of_step(step: int) -> Tensor:
            generator = seeded(self._seed * self._stages.depth + block, step)
            return loss(self._fitted[int(torch.multinomial(shares, 1, generator=generator))])

        @torch.no_grad()
        def held_out() -> float:
            return sum(self._shares[number] * float(loss(number)) for number in self._held)

        begun = self._work.done("length")
        if begun is None:
            # the first block stands for all
            seconds = step_seconds(loss_of_step) * self._stages.depth if wanted.steps is None else 0.0
            begun = {"steps": wanted.count(seconds)}
            self._work.mark_done("length", begun)
        before = held_out()
        training = Training(student.parameters(), loss_of_step, begun["steps"], rate, _training(block), self._optimizer)
        try:
            training.run(self._work, partial(self._reported, block))
        except NotFiniteError as error:
            warnings.warn(f"the training of block {block} ended at {error}, whose loss is not a number", stacklevel=2)
        return held_out() < before

    @torch.no_grad()
    def _advance(self, states: HiddenStates, block: int, fitted: Iterable[int] = ()) -> Routes:
        """Move samples past a block as it is now, always those that are held out; returns the routes of these."""
        routes = Routes()
        states.advance(block, numbers=fitted)
        with routes.recorded(self._view, (block,)):
            states.advance(block, numbers=self._held)
        return routes

    @torch.no_grad()
    def _divergence(self, states: HiddenStates) -> float:
        """From the original's predictions on the samples that are held out."""
        total = 0.0
        for number in self._held:
            truth, found = (
                log_probabilities(self._stages, some.at(self._stages.depth, number))
                for some in (self._original, states)
            )
            total += self._shares[number] * float(divergence(truth, found))
        return total

    def _reported(self, block: int, step: str, done: int, total: int, **facts: Fact) -> None:
        self._report(step, block * total + done, self._stages.depth * total, layer=block, **facts)


def _error(found: Tensor, wanted: Tensor, gradients: Gradients | None) -> Tensor:
    """Of a block's outputs: about what it adds to the loss, or its square relative to theirs."""
    error = found.float() - wanted
    if gradients is None or len(gradients.rest) != error.shape[-1]:
        return error.square().mean() / wanted.square().mean()
    of_rows = (error @ gradients.rows.float().T).square().sum(-1)
    return (of_rows + error.square() @ gradients.rest.float()).mean() / 2


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _note(block: int) -> str:
    return f"block-{block}"


def _training(block: int) -> str:
    return f"training-{block}"
