"""How much memory the process may take, and has taken."""

import ctypes
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from moqa.errors import MoqaError
from moqa.models.free import free_on_machine
from moqa.models.stored import Stored

# numbers of the C library's options, the bytes from which a block is large, and what it may keep of smaller ones
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE, _KEPT = -1, -3, 4 * 2**20, 32 * 2**20
_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
    "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """A limit for the process.

    >>> Memory.parse("4GiB").limit
    4294967296

    Attributes:
        limit: bytes that may be resident.
        typed: how the user said it; None for what is free.
    """

    limit: int
    typed: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Memory":
        """A limit as users type it.

        Raises:
            MoqaError: if it is none.
        """
        return cls(parse_size(text, "--max-memory"), text)

    @classmethod
    def free(cls) -> "Memory":
        """What is free on this machine, or in this container, and what the process has already."""
        return cls(free_on_machine() + resident())

    def holds(self, folder: Path) -> bool:
        """Whether it holds a whole original in float32, and half of it for what works with it."""
        return resident() + Stored(folder).values * 6 <= self.limit


def parse_size(text: str | int, option: str) -> int:
    """Bytes of a size as users type it.

    >>> parse_size("12MiB", "--size")
    12582912

    Args:
        text: bytes, or a number with a unit: KB, MB, GB, TB, KiB, MiB, GiB, TiB.
        option: that it was typed after.

    Raises:
        MoqaError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _FACTORS:
        raise MoqaError(f"{option} {text} is no size", "give bytes or e.g. 12MiB, 3.5GB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def resident() -> int:
    """Bytes of the process that are in memory now; the most that were, on a system without /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def return_large_blocks() -> None:
    """Have every large block go back to the system when it is freed, so that memory is what is in use.

    The C library otherwise raises the size from which it does so to 32 MB, and keeps what lies below.
    """
    # oneDNN and torch's use of it keep code and scratch memory for the last 1024 shapes of products; rows go in few
    # (`narrow.in_blocks`), and both look at these when they multiply for the first time
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is not None:
        options(_MMAP_THRESHOLD, _LARGE)
        # else memory at the heap's end is returned and asked for again with every block
        options(_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Return freed memory to the system: the C library keeps small pieces for itself otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
