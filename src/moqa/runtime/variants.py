"""What a loaded model can switch between while it runs: the checkpoint as it is, and variants of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moqa.kernels import ExpertStack, PackedMatrix, Patch


@dataclass(eq=False)
class ExpertsVariant:
    """What a variant changes in the experts of one layer.

    Attributes:
        patches: channels with bits of their own.
        matrices: (expert, projection) -> replacement of a packed matrix.
        stack: all experts in the form that kernels take, after their first use.
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

    >>> variants = Variants()
    >>> variants.hold("german", {0: ExpertsVariant(), 1: ExpertsVariant()})
    >>> variants.switch("german")
    >>> variants.current, variants.generation
    ('german', 1)

    Attributes:
        current: the variant in use; None is the checkpoint as it is.
        generation: number of changes so far to what the model computes with; after one, decoders look again.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self.generation = 0
        self._held: dict[str, Mapping[int, ExpertsVariant]] = {}

    def hold(self, name: str, layers: Mapping[int, ExpertsVariant]) -> None:
        """Hold a variant for `switch`.

        Args:
            name: to hold it under.
            layers: index -> what it changes in that layer; it changes nothing in others.
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
        """Tell decoders to look again at the variant in use and at where tokens are counted."""
        self.generation += 1

    def of_layer(self, layer: int) -> ExpertsVariant | None:
        """What the variant in use changes in a layer; None if nothing."""
        return None if self.current is None else self._held[self.current].get(layer)

    def all_of_layer(self, layer: int) -> Iterator[ExpertsVariant]:
        """What each held variant changes in a layer, in use or not."""
        return (layers[layer] for layers in self._held.values() if layer in layers)
