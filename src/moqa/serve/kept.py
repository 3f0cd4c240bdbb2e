"""The few adjustments that a server has made last."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moqa.format.adjustment import Adjustment

if TYPE_CHECKING:
    from moqa.runtime.adjusted import Adjustments

KEPT = 4


@dataclass(eq=False)
class MadeAdjustment:
    """An adjustment that was made.

    Attributes:
        name: by which it is held.
        shares: [layers, experts] routing of the text that it is for.
    """

    name: str
    shares: np.ndarray


class KeptAdjustments:
    """Adjustments that were made, at most `KEPT` of them: the one used longest ago makes room for another.

    One that leaves stays held while a text is written with it, that is while somebody holds what `find` gave.

    Args:
        held: those of the model; only the thread that writes changes what is kept.
    """

    def __init__(self, held: "Adjustments") -> None:
        self._held = held
        self._made: list[MadeAdjustment] = []  # the one used last at the end
        self._leaving: list[tuple[str, weakref.ref[MadeAdjustment]]] = []

    @property
    def names(self) -> list[str]:
        """Those that a request may choose."""
        return [made.name for made in self._made.copy()]

    def find(self, name: str | None) -> MadeAdjustment | None:
        """One of them by its name."""
        return next((made for made in self._made.copy() if made.name == name), None)

    def nearest(self, distance: Callable[[np.ndarray], float]) -> MadeAdjustment | None:
        """The one whose shares are nearest."""
        return min(self._made, key=lambda made: distance(made.shares), default=None)

    def use(self, made: MadeAdjustment) -> None:
        """Note that one of them is used now."""
        self._made.remove(made)
        self._made.append(made)

    def add(self, adjustment: Adjustment, made: MadeAdjustment) -> None:
        """Hold another one; drops what is too much and not written with."""
        self._held.hold(adjustment, made.name)
        self._made.append(made)
        if len(self._made) > KEPT:
            oldest = self._made.pop(0)
            self._leaving.append((oldest.name, weakref.ref(oldest)))
            del oldest
        for name, left in self._leaving.copy():
            if left() is None:
                if self._held.current == name:
                    self._held.switch(None)
                self._held.drop(name)
                self._leaving.remove((name, left))
