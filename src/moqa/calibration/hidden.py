"""Hidden states of some samples on their way through a model's blocks: the one way in which layers are run."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from moqa.models.layerwise import LayerwiseModel
from moqa.storage.in_memory import StepStore


class HiddenStates:
    """Samples in front of blocks; between them they lie on disk or in memory, and are run in batches.

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

    def __init__(self, stages: LayerwiseModel, work: StepStore, name: str, batches: Sequence[Tensor]) -> None:
        self._stages, self._work, self._name, self._count = stages, work, name, len(batches)
        embedded, shapes = work.done(f"embedded-{name}") is not None, set()
        for number, batch in enumerate(batches):
            # masks and positions of every layer are made with the embedding, whatever the tokens are
            if embedded and batch.shape in shapes:
                continue
            hidden = stages.embed(batch)
            shapes.add(batch.shape)
            if not embedded:
                self.put(0, number, hidden)
        if not embedded:
            work.mark_done(f"embedded-{name}", {})

    def at(self, layer: int, number: int) -> Tensor:
        """[windows, context, features] one batch at the input of a layer; behind the last layer, at the head's.

        Raises:
            MoqaError: if what was put aside is damaged.
        """
        return self._work.load(self._file(layer, number))["x"]

    def __len__(self) -> int:
        """Number of batches."""
        return self._count

    def advance(self, layer: int, *, keep: bool = True, numbers: Iterable[int] | None = None) -> None:
        """Move batches past a layer, as it computes now.

        Args:
            layer: index.
            keep: whether what lies in front of the layer stays.
            numbers: of the batches to move; None means all.
        """
        for number in range(self._count) if numbers is None else numbers:
            self.put(layer + 1, number, self._stages.run_block(layer, self.at(layer, number)).float())
            if not keep:
                self._work.remove(self._file(layer, number))

    def forget(self, layer: int) -> None:
        """Remove what lies in front of a layer."""
        for number in range(self._count):
            self._work.remove(self._file(layer, number))

    def put(self, layer: int, number: int, hidden: Tensor) -> None:
        """Put one batch in front of a layer."""
        self._work.save(self._file(layer, number), {"x": hidden})

    def _file(self, layer: int, number: int) -> str:
        return f"hidden-{layer}-{self._name}-{number}"
