"""What an engine is, and the one that works in this process."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from moqa.execution.workspace import Workspace
from moqa.memory.limit import MemoryLimit
from moqa.progress import Report

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Does pieces of work that do not depend on each other.

    Attributes:
        name: as users type it.
    """

    name: str

    @property
    def workers(self) -> int:
        """How many pieces are done at the same time."""

    def memory(self, given: MemoryLimit | None) -> MemoryLimit:
        """What one process may take: as given, else what is free for it."""

    def prepare(self, model: Path, out: Path, report: Report) -> None:
        """Look whether a run can begin, before anything is written.

        Args:
            model: folder of the original.
            out: what will be made.
            report: is told where work will be done.

        Raises:
            MoqaError: if it cannot.
        """

    def map(
        self, work: Callable[[Workspace, Item], Result], site: Workspace, items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """Results of work, in the order of the items; closing it waits for those at work and gives up the rest.

        >>> for done in engine.map(quantize_piece, site, pieces):
        ...     report("quantize", layer, depth)

        Args:
            work: a function at the top of a module; what it returns, and what it puts aside in `site.work`, depends
                on nothing but its arguments.
            site: where it is done.
            items: what it is done with, one at a time; they can be pickled.

        Raises:
            Stopped: if the machines that did it are gone.
        """


class LocalExecutor:
    """Works in this process, on each piece when its result is asked for.

    >>> list(LocalExecutor().map(work, site, [1, 2]))
    """

    name = "local"
    workers = 1

    def memory(self, given: MemoryLimit | None) -> MemoryLimit:
        """See `Executor`."""
        return given or MemoryLimit.free()

    def prepare(self, model: Path, out: Path, report: Report) -> None:
        """See `Executor`: whatever is wrong shows here."""

    def map(
        self, work: Callable[[Workspace, Item], Result], site: Workspace, items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """See `Executor`."""
        for item in items:
            yield work(site, item)
