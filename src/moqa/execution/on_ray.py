"""The executor for many machines: pieces of work as tasks of an existing Ray cluster."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moqa.errors import MoqaError, Stopped, one_line
from moqa.execution.cluster import ask, connect, nodes, token
from moqa.execution.local import Item, Result
from moqa.execution.workspace import Workspace, WorkspaceAddress, opened
from moqa.memory.limit import MemoryLimit, free_on_machine
from moqa.progress import Report

# lost workers after which a piece is given up: machines come and go, but a piece may also kill its workers
_RETRIES = 8
# seconds between checks that workers are left
_CHECK_SECONDS = 10.0


class RayExecutor:
    """Works on the nodes of a Ray cluster; this process joins it, and shares its file system.

    >>> engine = RayExecutor("10.0.0.1:6379")  # doctest: +SKIP
    >>> moqa.quantize("/shared/model", plan, "/shared/out", engine=engine)  # doctest: +SKIP

    Each worker computes with as many threads as torch uses here, and takes as many CPUs of its node.

    Args:
        address: HOST:PORT of the head, or `auto` for the cluster of this machine.

    Raises:
        MoqaError: if Ray is not installed, there is no cluster at the address, or no node has enough CPUs.
    """

    name = "ray"

    def __init__(self, address: str = "auto") -> None:
        self._ray, self._threads = connect(address), torch.get_num_threads()
        if not self._places():
            largest = max((node.cpus for node in nodes(self._ray, 0)), default=0)
            raise MoqaError(
                f"no node of the Ray cluster offers {self._threads} CPUs, the threads of this process",
                f"the largest offers {largest}: set OMP_NUM_THREADS, or `ray start --num-cpus`",
            )

    @property
    def workers(self) -> int:
        """See `Executor`."""
        return max(1, self._places())

    def memory(self, given: MemoryLimit | None) -> MemoryLimit:
        """See `Executor`; workers share the free memory of their machine, with a further share for this process."""
        if given is not None:
            return given
        free = ask(self._ray, nodes(self._ray, self._threads), free_on_machine)
        each = [size // (node.cpus // self._threads + 1) for node, size in free]
        return MemoryLimit(min(MemoryLimit.free().limit, *each))

    def prepare(self, model: Path, out: Path, report: Report) -> None:
        """See `Executor`: every node must see the model and the output, and compute with the same versions."""
        members = nodes(self._ray, self._threads)
        with token(out.absolute().parent) as shared:
            for node, lacking in ask(self._ray, members, WorkspaceAddress.here(model, shared).lacking):
                if lacking:
                    raise MoqaError(
                        f"node {node.name} {lacking}",
                        "all machines need the same installation, and one file system with model and output",
                    )
        report("cluster", 1, 1, nodes=len(members), workers=self.workers, threads=self._threads)

    def map(
        self, work: Callable[[Workspace, Item], Result], workspace: Workspace, items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """See `Executor`; a piece whose worker or node is lost is done again elsewhere."""
        rest = iter(items)
        task = self._ray.remote(_do).options(
            num_cpus=self._threads, max_retries=_RETRIES, scheduling_strategy="SPREAD", name=work.__name__
        )
        waiting: deque[Any] = deque()
        try:
            while True:
                # two tasks per worker keep workers busy; more would only take memory
                ahead = 2 * self.workers - len(waiting)
                waiting.extend(task.remote(work, workspace.place, item) for item in islice(rest, ahead))
                if not waiting:
                    return
                result = self._result(waiting[0])
                waiting.popleft()
                yield result
        finally:
            self._let_end(list(waiting))

    def _places(self) -> int:
        """Number of workers that the cluster has room for now: nodes come and go."""
        return sum(node.cpus // self._threads for node in nodes(self._ray, self._threads))

    def _result(self, reference: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            while not self._ray.wait([reference], timeout=_CHECK_SECONDS)[0]:
                if not self._places():
                    raise Stopped("no node of the Ray cluster is left; the same command continues from there")
            return self._ray.get(reference)
        except RayTaskError as error:
            # as if it had happened in this process; bugs keep the traceback of the task
            if isinstance(error.cause, MoqaError | Stopped | OSError | MemoryError | SafetensorError):
                raise error.cause from None
            raise
        except RayError as error:
            raise Stopped(
                f"the Ray cluster failed ({one_line(error)}); the same command continues from there"
            ) from None

    def _let_end(self, references: list[Any]) -> None:
        """Wait for tasks whose results are not needed, so that they do not write into what comes next.

        They are not cancelled: if a task ends at that moment, cancelling aborts the process that does it (Ray 2.60).
        """
        while references and self._places():
            references = self._ray.wait(references, num_returns=len(references), timeout=_CHECK_SECONDS)[1]


def _do(work: Callable[[Workspace, Any], Any], place: WorkspaceAddress, item: Any) -> Any:
    """A task: one piece of work; what it saves is on the disk when it returns."""
    workspace = opened(place)
    result = work(workspace, item)
    workspace.work.flush()
    return result
