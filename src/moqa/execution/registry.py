"""Executors by the name that users type after `--engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moqa.errors import MoqaError
from moqa.registry import check_known

if TYPE_CHECKING:
    from moqa.execution.local import Executor

DEFAULT_EXECUTOR = "local"


# name -> where it does the work
EXECUTORS = {"local": "this process", "ray": "the machines of a cluster"}


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
    check_known("--engine", name, EXECUTORS)
    if name == "ray":
        from moqa.execution.on_ray import RayExecutor

        return RayExecutor(address or "auto")
    if address is not None:
        raise MoqaError(f"--ray-address {address} is for --engine ray", "add it, or leave the address out")
    from moqa.execution.local import LocalExecutor

    return LocalExecutor()
