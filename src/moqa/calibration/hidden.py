"""Hidden states of some samples on their way through a model's decoder layers, on disk between layers."""

from collections.abc import Sequence

from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.storage.resumable import ResumableRun


class HiddenStates:
    """Samples in front of decoder layers; they lie on disk, and pass through memory in batches.

    >>> hidden = HiddenStates(stages, work, "wiki", batches(tokens))
    >>> hidden.advance(0)
    >>> hidden.at(1, 0).shape
    torch.Size([8, 256, 256])

    Args:
        stages: of the model.
        work: where hidden states are put aside; it may hold those of a run that was killed.
        name: of the samples, another for each of those that share `work`.
        batches: [windows, context] token ids each.
    """

    def __init__(self, stages: LayerwiseModel, work: ResumableRun, name: str, batches: Sequence[Tensor]) -> None:
        self._stages, self._work, self._name, self._count = stages, work, name, len(batches)
        embedded, shapes = work.noted(f"embedded-{name}") is not None, set()
        for number, batch in enumerate(batches):
            # masks and positions of every layer are made with the embedding, whatever the tokens are
            if embedded and batch.shape in shapes:
                continue
            hidden = stages.embed(batch)
            shapes.add(batch.shape)
            if not embedded:
                self._put(0, number, hidden)
        if not embedded:
            work.note(f"embedded-{name}", {})

    def at(self, layer: int, number: int) -> Tensor:
        """[windows, context, features] one batch at the input of a layer; behind the last layer, at the head's.

        Raises:
            MoqaError: if what was put aside is damaged.
        """
        return self._work.kept(self._file(layer, number))["x"]

    def advance(self, layer: int) -> None:
        """Move all batches past a layer, as it computes now."""
        for number in range(self._count):
            self._put(layer + 1, number, self._stages.layer(layer, self.at(layer, number)))

    def forget(self, layer: int) -> None:
        """Remove what lies in front of a layer."""
        for number in range(self._count):
            self._work.drop(self._file(layer, number))

    def _put(self, layer: int, number: int, hidden: Tensor) -> None:
        self._work.keep(self._file(layer, number), {"x": hidden})

    def _file(self, layer: int, number: int) -> str:
        return f"hidden-{layer}-{self._name}-{number}"
