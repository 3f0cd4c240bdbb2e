"""What a loaded model can switch between while it runs: the checkpoint as it is, and variants of it."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moqa.errors import MoqaError
from moqa.kernels import ExpertStack, PackedMatrix, Patch

# held by whoever changes what a model holds or computes with; a fork waits until nobody does
CHANGING = threading.RLock()
os.register_at_fork(before=CHANGING.acquire, after_in_parent=CHANGING.release, after_in_child=CHANGING.release)


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

    Threads may run the model while others switch: a forward pass keeps the variant that it began with (`pinned`).

    Attributes:
        current: the variant in use; None is the checkpoint as it is.
        generation: number of changes so far to what the model computes with; after one, decoders look again.
        adapted: (layer, expert) that PEFT adapts; adjustments do not know of it.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        self.generation = 0
        self.adapted: set[tuple[int, int]] = set()
        self._held: dict[str, Mapping[int, ExpertsVariant]] = {}
        self._in_use: Mapping[int, ExpertsVariant] = {}
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._thread = threading.local()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """A `with` block in which this thread computes with the variant that is in use at its beginning."""
        self.pin()
        try:
            yield
        finally:
            self.unpin()

    def pin(self, *_: object) -> None:
        """Begin such a block; blocks may be nested. A hook of the model, like `unpin`."""
        depth, in_use = self._pinned
        self._thread.pinned = depth + 1, self._in_use if in_use is None else in_use

    def unpin(self, *_: object) -> None:
        """End it."""
        depth, in_use = self._pinned
        self._thread.pinned = (depth - 1, in_use) if depth > 1 else (0, None)

    @property
    def _pinned(self) -> tuple[int, Mapping[int, ExpertsVariant] | None]:
        """How many blocks this thread is in, and what it computes with in them."""
        return getattr(self._thread, "pinned", (0, None))

    def hold(self, name: str, layers: Mapping[int, ExpertsVariant]) -> None:
        """Hold a variant for `switch`.

        Args:
            name: to hold it under.
            layers: index -> what it changes in that layer; it changes nothing in others.
        """
        self._held[name] = layers

    def check_not_adapted(self) -> None:
        """Refuse adjustments of experts that PEFT adapts.

        Raises:
            MoqaError: if there are any.
        """
        if self.adapted:
            raise MoqaError("an adjustment cannot be used together with a LoRA on experts", "use one of the two")

    def drop(self, name: str) -> None:
        """Forget a variant that is not in use."""
        assert name != self.current
        del self._held[name]

    def switch(self, name: str | None) -> None:
        """Compute with another variant that is held; None is the checkpoint as it is."""
        if name != self.current:
            assert name is None or name in self._held
            self._in_use = {} if name is None else self._held[name]
            self.current = name
            self.changed()

    def changed(self) -> None:
        """Tell decoders to look again at the variant in use and at where tokens are counted."""
        self.generation += 1

    def of_layer(self, layer: int) -> ExpertsVariant | None:
        """What the variant in use changes in a layer; None if nothing."""
        in_use = self._pinned[1]
        return (self._in_use if in_use is None else in_use).get(layer)

    def all_of_layer(self, layer: int) -> Iterator[ExpertsVariant]:
        """What each held variant changes in a layer, in use or not."""
        return (layers[layer] for layers in list(self._held.values()) if layer in layers)
