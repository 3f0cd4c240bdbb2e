"""Adjustments that a server has made: loaded for as long as they are used."""

import weakref
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from moqa.format.adjustment import Adjustment

if TYPE_CHECKING:
    from moqa.runtime.adjusted import Adjustments


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
