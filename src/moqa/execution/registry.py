"""Engines by the name that users type."""

from moqa.errors import MoqaError
from moqa.execution.local import Executor, LocalExecutor

EXECUTORS = ("local", "ray")


def find_executor(name: str = "local", *, address: str | None = None) -> Executor:
    """An engine that is ready.

    >>> find_executor("ray", "10.0.0.1:6379").workers
    12

    Args:
        name: `local` for this process, `ray` for the machines of a Ray cluster.
        address: of the cluster's head, as `ray start --head` tells it; None for the cluster of this machine.

    Raises:
        MoqaError: if there is no such engine, Ray is not installed, or no cluster is at the address.
    """
    if name not in EXECUTORS:
        raise MoqaError(f"--engine {name} is unknown", f"there are {', '.join(EXECUTORS)}")
    if name == "ray":
        from moqa.execution.on_ray import RayExecutor

        return RayExecutor(address or "auto")
    if address is not None:
        raise MoqaError(f"--ray-address {address} is for --engine ray", "add it, or leave the address out")
    return LocalExecutor()
