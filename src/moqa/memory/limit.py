"""How much memory the process may use, and how much is free."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moqa.errors import MoqaError
from moqa.memory.process import resident

_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
    "TIB": 2**40,
}  # fmt: skip
# controllers of cgroup version 2 and 1 -> files with the limit and the usage, and the statistic of inactive file pages
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True)
class MemoryLimit:
    """A limit for the resident memory of the process.

    >>> MemoryLimit.parse("4GiB").limit
    4294967296

    Attributes:
        limit: bytes that may be resident.
        typed: as the user typed it; None if it is the free memory.
    """

    limit: int
    typed: str | None = None

    @classmethod
    def parse(cls, text: str) -> "MemoryLimit":
        """A limit as users type it.

        Raises:
            MoqaError: if it is not a size.
        """
        return cls(parse_size(text, "--max-memory"), text)

    @classmethod
    def free(cls) -> "MemoryLimit":
        """Free memory of this machine or container, plus what the process already uses."""
        return cls(free_on_machine() + resident())

    def __str__(self) -> str:
        return f"--max-memory {self.typed}" if self.typed else f"{self.limit / 2**30:.2f} GiB of free memory"

    def holds(self, values: int) -> bool:
        """Whether a number of values fits in float32, with half as much again for the work on them."""
        return resident() + values * 6 <= self.limit


def parse_size(text: str | int, option: str) -> int:
    """Bytes of a size as users type it.

    >>> parse_size("12MiB", "--size")
    12582912

    Args:
        text: bytes, or a number with a unit: KB, MB, GB, TB, KiB, MiB, GiB, TiB.
        option: option that it was typed after, for the message.

    Raises:
        MoqaError: if it is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _FACTORS:
        raise MoqaError(f"{option} {text} is not a size", "give bytes or e.g. 12MiB, 3.5GB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can still use: on the GPU if there is one, else `free_on_machine`.

    >>> free_memory() > 2**20
    True

    Args:
        root: folder that holds `proc` and `sys`.

    Raises:
        MoqaError: if the system does not report it.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_on_machine(root)


def free_on_machine(root: Path = Path("/")) -> int:
    """Bytes that a process can still use within the machine and its cgroups.

    Args:
        root: folder that holds `proc` and `sys`.

    Raises:
        MoqaError: if the system does not report it.
    """
    try:
        available = (root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    except (OSError, IndexError):
        raise MoqaError("/proc/meminfo shows no free memory", "give a size: --fit 8GiB, --max-memory 8GiB") from None
    return min([int(available) * 1024, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Free bytes under the limits of the process's own group and of the groups above it."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, place = line.split(":", 2)
        if controllers in _FILES:
            top = root / "sys/fs/cgroup" / controllers
            group = top / place.strip("/")
            # in a container the path may be the host's: then its own group is the top one
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
