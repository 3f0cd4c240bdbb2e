"""The last few adjustments that a server has made."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
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
        name: name of the adjustment.
        shares: [layers, experts] routing of the text that it was made for.
    """

    name: str
    shares: np.ndarray


class KeptAdjustments:
    """Adjustments that were made, at most `MAX_KEPT`: a new one replaces the least recently used one.

    A replaced one stays loaded for as long as a text is written with it, i.e. while there is a reference to the result
    of `find`.

    Args:
        held: adjustments of the model; only the thread that writes text changes what is kept.
    """

    def __init__(self, held: "Adjustments") -> None:
        self._held = held
        self._made: list[MadeAdjustment] = []  # the most recently used one is last
        self._leaving: list[tuple[str, weakref.ref[MadeAdjustment]]] = []

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

    def add(self, adjustment: Adjustment, made: MadeAdjustment) -> None:
        """Add an adjustment; drops replaced ones that no text is written with."""
        self._held.hold(adjustment, made.name)
        self._made.append(made)
        if len(self._made) > MAX_KEPT:
            oldest = self._made.pop(0)
            self._leaving.append((oldest.name, weakref.ref(oldest)))
            del oldest
        for name, left in self._leaving.copy():
            if left() is None:
                if self._held.current == name:
                    self._held.switch(None)
                self._held.drop(name)
                self._leaving.remove((name, left))
