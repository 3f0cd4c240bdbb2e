"""Adjustments that a server has made: the last few of each client, loaded for as long as they are used."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from moqa.format.adjustment import Adjustment

if TYPE_CHECKING:
    from moqa.runtime.adjusted import Adjustments

MAX_KEPT = 4


@dataclass(eq=False)
class MadeAdjustment:
    """An adjustment that was made.

    Attributes:
        name: its name for the client that it was made for.
        held: its name in the model, which holds those of all clients.
        shares: [layers, experts] routing of the text that it was made for.
    """

    name: str
    held: str
    shares: np.ndarray


class LoadedAdjustments:
    """Adjustments that were made and loaded, each for as long as anything refers to its `MadeAdjustment`.

    Args:
        held: adjustments of the model; only the thread that writes text changes what is held.
    """

    def __init__(self, held: "Adjustments") -> None:
        self._held = held
        self._left: SimpleQueue[str] = SimpleQueue()  # the last reference may be dropped in any thread

    def add(self, adjustment: Adjustment, made: MadeAdjustment) -> None:
        """Load an adjustment."""
        self._held.hold(adjustment, made.held)
        weakref.finalize(made, self._left.put, made.held).atexit = False

    def drop_unused(self) -> None:
        """Drop the adjustments that nothing refers to any more."""
        while not self._left.empty():
            name = self._left.get()
            if self._held.current == name:
                self._held.switch(None)
            self._held.drop(name)


class KeptAdjustments:
    """The adjustments of one client, at most `MAX_KEPT`: a new one replaces the least recently used one."""

    def __init__(self) -> None:
        self._made: list[MadeAdjustment] = []  # the most recently used one is last

    @property
    def names(self) -> list[str]:
        """Names of the adjustments that a request may choose."""
        return [made.name for made in self._made.copy()]

    def find(self, name: str | None) -> MadeAdjustment | None:
        """The adjustment with a name, if it is kept."""
        return next((made for made in self._made.copy() if made.name == name), None)

    def nearest(self, distance: Callable[[np.ndarray], float]) -> MadeAdjustment | None:
        """The adjustment with the smallest distance of its shares."""
        return min(self._made, key=lambda made: distance(made.shares), default=None)

    def use(self, made: MadeAdjustment) -> None:
        """Mark an adjustment as the most recently used one."""
        self._made.remove(made)
        self._made.append(made)

    def add(self, made: MadeAdjustment) -> None:
        """Keep one more."""
        self._made.append(made)
        del self._made[:-MAX_KEPT]
