"""The memory that is free here."""

from collections.abc import Iterator
from pathlib import Path

import torch

from moqa.errors import MoqaError

# of each version of cgroups, by the name of its controllers: its limit, what is taken, and what of that are idle files
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a process may still take: on the GPU if there is one, else `free_on_machine`.

    >>> free_memory()
    8372121600

    Args:
        root: below which `proc` and `sys` lie.

    Raises:
        MoqaError: if the system does not say.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_on_machine(root)


def free_on_machine(root: Path = Path("/")) -> int:
    """Bytes that a process may still take of the machine and of its cgroups.

    Args:
        root: below which `proc` and `sys` lie.

    Raises:
        MoqaError: if the system does not say.
    """
    try:
        available = (root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    except (OSError, IndexError):
        raise MoqaError("/proc/meminfo tells no free memory", "give a size: --fit 8GiB, --max-memory 8GiB") from None
    return min([int(available) * 1024, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What the limits leave of the process's own group and of all above it."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, place = line.split(":", 2)
        if controllers in _FILES:
            top = root / "sys/fs/cgroup" / controllers
            group = top / place.strip("/")
            # in a container the place may be the host's: then its own group lies at the top
            folders = [group, *group.parents] if group.is_dir() else [top]
            for folder in folders:
                if folder.is_relative_to(top):
                    yield from _left(folder, *_FILES[controllers])


def _left(group: Path, limit: str, taken: str, idle: str) -> Iterator[int]:
    if not (group / limit).is_file():  # the topmost group has none
        return
    most = (group / limit).read_text().strip()
    if most != "max":
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield int(most) - int((group / taken).read_text()) + int(statistics.get(idle, 0))
