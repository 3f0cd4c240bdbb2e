"""The interface of executors, and the one that works in this process."""

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
        name: as users type it after `--engine`.
    """

    name: str

    @property
    def workers(self) -> int:
        """Number of pieces that are done at the same time."""

    def memory(self, given: MemoryLimit | None) -> MemoryLimit:
        """Memory limit of one process: as given, else what is free for it."""

    def prepare(self, model: Path, out: Path, report: Report) -> None:
        """Check that a run can begin, before anything is written.

        Args:
            model: folder of the original.
            out: folder that will be made.
            report: called with where work will be done.

        Raises:
            MoqaError: if it cannot begin.
        """

    def map(
        self, work: Callable[[Workspace, Item], Result], workspace: Workspace, items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """Results of work in the order of the items; closing the generator waits for running pieces and drops the rest.

        >>> def first_unit(workspace, layer):
        ...     return workspace.view.block_units(layer)[0].name
        >>> list(LocalExecutor().map(first_unit, workspace, [0]))
        ['model.layers.0.self_attn.q_proj']

        Args:
            work: a function at the top of a module; what it returns, and what it saves in `workspace.work`, depends
                only on its arguments.
            workspace: first argument of `work`.
            items: second arguments of `work`, one for each piece; they can be pickled.

        Raises:
            Stopped: if the machines that do the work are gone.
        """


class LocalExecutor:
    """Works in this process, on each piece when its result is requested.

    >>> list(LocalExecutor().map(lambda workspace, layer: len(workspace.view.block_units(layer)), workspace, [0, 1]))
    [52, 52]
    """

    name = "local"
    workers = 1

    def memory(self, given: MemoryLimit | None) -> MemoryLimit:
        """See `Executor`."""
        return given or MemoryLimit.free()

    def prepare(self, model: Path, out: Path, report: Report) -> None:
        """See `Executor`: nothing to check in this process."""

    def map(
        self, work: Callable[[Workspace, Item], Result], workspace: Workspace, items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """See `Executor`."""
        for item in items:
            yield work(workspace, item)
