"""Executors by the name that users type after `--engine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.registry import Registry

if TYPE_CHECKING:
    from moqa.execution.local import Executor

DEFAULT_EXECUTOR = "local"


@dataclass(frozen=True)
class ExecutorKind:
    """A kind of executor.

    Attributes:
        help: where it does the work.
        start: starts one; an address is refused where there is no cluster.
    """

    help: str
    start: Callable[[str | None], Executor]


def _local(address: str | None) -> Executor:
    from moqa.execution.local import LocalExecutor

    if address is not None:
        raise MoqaError(f"--ray-address {address} is for --engine ray", "add it, or leave the address out")
    return LocalExecutor()


def _ray(address: str | None) -> Executor:
    from moqa.execution.on_ray import RayExecutor

    return RayExecutor(address or "auto")


EXECUTORS: Registry[ExecutorKind] = Registry("--engine")
EXECUTORS.update(local=ExecutorKind("this process", _local), ray=ExecutorKind("the machines of a cluster", _ray))


def find_executor(name: str = DEFAULT_EXECUTOR, *, address: str | None = None) -> Executor:
    """An executor, ready to work.

    >>> find_executor("local").workers
    1

    Args:
        name: one of `EXECUTORS`: `local` for this process, `ray` for the machines of a Ray cluster.
        address: of the cluster's head, as `ray start --head` prints it; None for the cluster of this machine.

    Raises:
        MoqaError: if there is no such executor, Ray is not installed, or there is no cluster at the address.
    """
    return EXECUTORS.find(name).start(address)
