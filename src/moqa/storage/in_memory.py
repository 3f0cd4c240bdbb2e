"""Steps of work in memory, for work that is too short to be worth resuming."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from torch import Tensor


class InMemoryRun:
    """Keeps the results of steps as `ResumableRun` does on the disk.

    >>> run = InMemoryRun()
    >>> run.save("hidden-0", {"x": torch.ones(3)})
    >>> run.load("hidden-0")["x"]
    tensor([1., 1., 1.])
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See `ResumableRun`."""
        self._tensors[name] = dict(tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """See `ResumableRun`."""
        return dict(self._tensors[name])

    def remove(self, name: str) -> None:
        """See `ResumableRun`."""
        for key in [key for key in self._tensors if fnmatch(key, name)]:
            del self._tensors[key]

    def mark_done(self, name: str, facts: Mapping[str, Any]) -> None:
        """See `ResumableRun`."""
        self._facts[name] = dict(facts)

    def done(self, name: str) -> dict[str, Any] | None:
        """See `ResumableRun`."""
        return self._facts.get(name)
