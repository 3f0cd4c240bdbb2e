"""A Ray cluster: connect to it, and run a question on each of its nodes."""

import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from moqa.errors import MoqaError, one_line
from moqa.storage.folders import writing

Answer = TypeVar("Answer")
_START = "start one with `ray start --head`, and `ray start --address=HOST:6379` on the other machines"
# the function in Ray's worker module that prints the errors of a cluster
_PRINTS = "print_to_stdstream"
# seconds to wait for an answer of the head
_CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True)
class Node:
    """A node of a cluster: a machine, or a part of one.

    Attributes:
        id: in Ray.
        name: for messages.
        cpus: number of CPUs that it offers.
    """

    id: str
    name: str
    cpus: int


def connect(address: str) -> Any:
    """Ray, connected to a cluster.

    Args:
        address: HOST:PORT of the head, or `auto` for the cluster that this machine belongs to.

    Raises:
        MoqaError: if Ray is not installed, or there is no cluster that this process can join.
    """
    try:
        import ray
    except ImportError:
        raise MoqaError("--engine ray needs Ray", "pip install 'moqa[ray]' on every machine") from None
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in ("auto", there):
            raise MoqaError(f"--ray-address {address}: this process has joined {there} already", "call ray.shutdown()")
        return ray
    _reach(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
    _warn_on_stderr()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's own errors, and those of its dependencies
        raise MoqaError(f"no Ray cluster at --ray-address {address} ({one_line(error)})", _START) from None
    return ray


def nodes(ray: Any, cpus: int) -> list[Node]:
    """Nodes that are alive and offer at least `cpus` CPUs."""
    found = []
    for entry in ray.nodes():
        name = f"{entry['NodeManagerAddress']} ({entry['NodeID'][:6]})"
        node = Node(entry["NodeID"], name, int(entry["Resources"].get("CPU", 0)))
        if entry["Alive"] and node.cpus >= cpus:
            found.append(node)
    return sorted(found, key=lambda node: node.name)


def ask(ray: Any, found: list[Node], question: Callable[[], Answer]) -> Iterator[tuple[Node, Answer]]:
    """The results of a function on every node.

    Raises:
        MoqaError: naming a node that cannot run it.
    """
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(node: Node) -> Any:
        only = NodeAffinitySchedulingStrategy(node.id, soft=False)
        return ray.remote(_call).options(num_cpus=0, scheduling_strategy=only).remote(question)

    for node, answer in [(node, there(node)) for node in found]:
        try:
            yield node, ray.get(answer)
        except RayError as error:
            reason = one_line(getattr(error, "cause", None) or error)
            raise MoqaError(
                f"node {node.name} cannot run moqa", f"install the same on every machine ({reason})"
            ) from None


def _call(question: Callable[[], Answer]) -> Answer:
    return question()


@contextmanager
def token(folder: Path) -> Iterator[Path]:
    """A temporary file in a folder, by which other machines recognize the same folder.

    Raises:
        MoqaError: if it cannot be written.
    """
    path = folder / f".moqa-{uuid4().hex}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _reach(address: str) -> None:
    """Check that something listens at an address: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise MoqaError(f"--ray-address {address} is not HOST:PORT", "give the head's, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MoqaError(f"no Ray cluster at --ray-address {address} ({reason})", _START) from None


def _warn_on_stderr() -> None:
    """Print Ray's warnings of lost workers on stderr, in one line: Ray prints pages on stdout, where results go.

    Ray 2.60 has neither an option nor a logger for this, so its private function is replaced. If that function is
    missing, Ray prints as usual.
    """
    try:
        private = importlib.import_module("ray._private.worker")
    except ImportError:
        return

    def tell(data: Mapping[str, Any], *_: object, **_options: object) -> None:
        for text in data.get("lines", ()):
            print(f"moqa: ray: {text.strip().splitlines()[0].split('. ')[0]}", file=sys.stderr, flush=True)

    if hasattr(private, _PRINTS):
        setattr(private, _PRINTS, tell)
