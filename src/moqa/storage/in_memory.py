"""Steps of work in memory, for work that is too short to be worth resuming."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, Protocol

from torch import Tensor


class StepStore(Protocol):
    """Where the results of steps are kept: `ResumableRun` on the disk, `InMemoryRun` in memory."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under a name."""

    def load(self, name: str) -> dict[str, Tensor]:
        """Saved tensors."""

    def remove(self, name: str) -> None:
        """Remove saved tensors; a pattern such as `hidden-*` removes several."""

    def mark_done(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a step is done."""

    def done(self, name: str) -> dict[str, Any] | None:
        """What was recorded of a step; None if it is not done."""


class InMemoryRun:
    """See `StepStore`.

    >>> run = InMemoryRun()
    >>> run.save("hidden-0", {"x": torch.ones(3)})
    >>> run.load("hidden-0")["x"]
    tensor([1., 1., 1.])
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See `StepStore`."""
        self._tensors[name] = dict(tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """See `StepStore`."""
        return dict(self._tensors[name])

    def remove(self, name: str) -> None:
        """See `StepStore`."""
        for key in [key for key in self._tensors if fnmatch(key, name)]:
            del self._tensors[key]

    def mark_done(self, name: str, facts: Mapping[str, Any]) -> None:
        """See `StepStore`."""
        self._facts[name] = dict(facts)

    def done(self, name: str) -> dict[str, Any] | None:
        """See `StepStore`."""
        return self._facts.get(name)
