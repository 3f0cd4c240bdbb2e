"""Hidden states of some samples at every block, and their gradients: the one way in which moqa runs blocks."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.storage.in_memory import InMemoryRun
from moqa.storage.resumable import ResumableRun


class HiddenStates:
    """Hidden states of samples at the inputs of blocks, saved on disk or in memory and moved in batches.

    >>> states = HiddenStates(stages, work, "example", stages.task.batches(tokens))
    >>> states.advance(0)
    >>> states.at(1, 0).shape
    torch.Size([2, 16, 256])

    Args:
        stages: of the model.
        work: where hidden states are saved; it may hold those of a run that was killed.
        name: of the samples; unique among those that share `work`.
        batches: what the model is called with, e.g. [windows, context] token ids.
    """

    def __init__(
        self, stages: LayerwiseModel, work: ResumableRun | InMemoryRun, name: str, batches: Sequence[Tensor]
    ) -> None:
        self._stages, self._work, self._name, self._count = stages, work, name, len(batches)
        embedded, shapes = work.done(f"embedded-{name}") is not None, set()
        for number, batch in enumerate(batches):
            # embedding also records the masks and positions of every block, which depend on the shape alone
            if embedded and batch.shape in shapes:
                continue
            hidden = stages.embed(batch)
            shapes.add(batch.shape)
            if not embedded:
                self.put(0, number, hidden)
        if not embedded:
            work.mark_done(f"embedded-{name}", {})

    def at(self, layer: int, number: int) -> Tensor:
        """One batch at the input of a block, e.g. [windows, context, features]; after the last block, at the head.

        Raises:
            MoqaError: if the saved states are damaged.
        """
        return self._work.load(self._file(layer, number))["x"]

    def __len__(self) -> int:
        """Number of batches."""
        return self._count

    def advance(self, layer: int, *, keep: bool = True, numbers: Iterable[int] | None = None) -> None:
        """Run a block, with its present weights, on batches at its input.

        Args:
            layer: index of the block.
            keep: whether the states at the block's input stay saved.
            numbers: of the batches to run; None means all.
        """
        if not self._stages.task.is_chain:
            return
        for number in range(self._count) if numbers is None else numbers:
            self.put(layer + 1, number, self._stages.run_block(layer, self.at(layer, number)).float())
            if not keep:
                self._work.remove(self._file(layer, number))

    def forget(self, layer: int) -> None:
        """Remove the states at the input of a block; those of a model whose blocks are no chain serve them all."""
        if not self._stages.task.is_chain:
            return
        for number in range(self._count):
            self._work.remove(self._file(layer, number))

    def put(self, layer: int, number: int, hidden: Tensor) -> None:
        """Save one batch as the input of a block."""
        self._work.save(self._file(layer, number), {"x": hidden})

    def _file(self, layer: int, number: int) -> str:
        layer = layer if self._stages.task.is_chain else 0
        return f"hidden-{layer}-{self._name}-{number}"


def run_back(
    stages: LayerwiseModel,
    block: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: Callable[[int, Tensor], None],
    *,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run a block again with gradients, batch by batch; observers of its units see the gradients.

    >>> gradients = []
    >>> run_back(stages, 3, [(hidden, torch.ones_like(hidden))], lambda number, found: gradients.append(found))
    >>> gradients[0].shape
    torch.Size([2, 16, 256])

    Args:
        stages: of the model.
        block: index of the block.
        batches: inputs of the block, and the gradients of its outputs.
        keep: called with the number of each batch and the gradient of its inputs.
        precision: makes the context in which the block runs, for every batch anew.
    """
    for number, (hidden, gradient) in enumerate(batches):
        inputs = hidden.detach().requires_grad_(True)
        with precision():
            out = stages.run_block(block, inputs)
        keep(number, torch.autograd.grad(out, inputs, gradient)[0])
