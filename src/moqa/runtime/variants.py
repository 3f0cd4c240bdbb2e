"""What a loaded model can switch between while it runs: the checkpoint as it is, and variants held beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moqa.kernels import ExpertStack, PackedMatrix, Patch


@dataclass(eq=False)
class ExpertsVariant:
    """What a variant changes in the experts of one layer.

    Attributes:
        patches: channels with bits of their own.
        matrices: (expert, projection) -> what stands in the place of a packed matrix.
        stack: all experts as kernels take them, once they were used.
    """

    patches: Sequence[Patch] = ()
    matrices: Mapping[tuple[int, str], PackedMatrix] = field(default_factory=dict)
    stack: ExpertStack | None = field(default=None, init=False, repr=False)

    def parts(self) -> list[PackedMatrix]:
        """All matrices."""
        channels = [channels for patch in self.patches for channels in patch.channels()]
        return [*self.matrices.values(), *(part.matrix for part in channels)]


class Variants:
    """The variants of one model, one of them in use. Adjustments are variants.

    >>> variants.hold("german", {0: ExpertsVariant(patches), 1: ExpertsVariant(other)})
    >>> variants.switch("german")
    >>> variants.generation
    1

    Attributes:
        current: the variant in use; None is the checkpoint as it is.
        generation: how often what the model computes with was changed; a decoder looks anew after that.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self.generation = 0
        self._held: dict[str, Mapping[int, ExpertsVariant]] = {}

    def hold(self, name: str, layers: Mapping[int, ExpertsVariant]) -> None:
        """Keep a variant at hand for `switch`.

        Args:
            name: to call it by.
            layers: number -> what it changes there; it changes nothing in others.
        """
        self._held[name] = layers

    def drop(self, name: str) -> None:
        """Forget a variant that is not in use."""
        assert name != self.current
        del self._held[name]

    def switch(self, name: str | None) -> None:
        """Compute with another variant that is held; None is the checkpoint as it is."""
        if name != self.current:
            assert name is None or name in self._held
            self.current = name
            self.changed()

    def changed(self) -> None:
        """Say that decoders must look anew: at the variant in use, or where tokens are counted."""
        self.generation += 1

    def of_layer(self, layer: int) -> ExpertsVariant | None:
        """What the variant in use changes in a layer; None if that is nothing."""
        return None if self.current is None else self._held[self.current].get(layer)

    def all_of_layer(self, layer: int) -> Iterator[ExpertsVariant]:
        """What the variants change in a layer, in use or not."""
        return (layers[layer] for layers in self._held.values() if layer in layers)
