"""How much memory the process uses, and how it returns memory to the system."""

import ctypes
import os
import re
import resource
from pathlib import Path

# options of glibc's mallopt
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# bytes from which a block is returned when it is freed, and bytes of smaller ones that malloc may keep
_LARGE, _KEPT = 4 * 2**20, 32 * 2**20


def resident() -> int:
    """Resident bytes of the process; on a system without /proc, the most so far."""
    now, peak = used()
    return peak if now is None else now


def used() -> tuple[int | None, int]:
    """Resident bytes of the process now (None where the system does not report them), and their peak.

    >>> now, peak = used()
    """
    try:
        status = Path("/proc/self/status").read_bytes()
        found = dict(re.findall(rb"(VmRSS|VmHWM):\s*(\d+) kB", status))
        return int(found[b"VmRSS"]) * 1024, int(found[b"VmHWM"]) * 1024
    except (OSError, KeyError):
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_large_blocks() -> None:
    """Return every large block to the system when it is freed, so that resident memory is what is in use.

    By default, the C library raises the size of such blocks up to 32 MB, and keeps smaller ones.
    """
    # oneDNN, and torch's use of it, keep code and scratch memory for the last 1024 shapes of products; moqa uses few
    # shapes (`moqa.models.products.in_blocks`). Both read these variables at the first product.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is not None:
        options(_MMAP_THRESHOLD, _LARGE)
        # otherwise the end of the heap would be returned and requested again with every block
        options(_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Return freed memory to the system, which the C library otherwise keeps for small blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def settle() -> None:
    """Return unused memory, now and from now on: called before the memory of long work is estimated."""
    return_large_blocks()
    give_back()
