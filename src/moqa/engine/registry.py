"""Engines by the name that users type."""

from moqa.engine.local import Engine, LocalEngine
from moqa.errors import MoqaError

ENGINES = ("local", "ray")


def find_engine(name: str = "local", address: str | None = None) -> Engine:
    """An engine that is ready.

    >>> find_engine("ray", "10.0.0.1:6379").workers
    12

    Args:
        name: `local` for this process, `ray` for the machines of a Ray cluster.
        address: of the cluster's head, as `ray start --head` tells it; None for the cluster of this machine.

    Raises:
        MoqaError: if there is no such engine, Ray is not installed, or no cluster is at the address.
    """
    if name not in ENGINES:
        raise MoqaError(f"--engine {name} is unknown", f"there are {', '.join(ENGINES)}")
    if name == "ray":
        from moqa.engine.on_ray import RayEngine

        return RayEngine(address or "auto")
    if address is not None:
        raise MoqaError(f"--ray-address {address} is for --engine ray", "add it, or leave the address out")
    return LocalEngine()
