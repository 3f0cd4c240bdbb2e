"""How much memory the process has taken, and how it gives memory back."""

import ctypes
import os
import resource
from pathlib import Path

# numbers of the C library's options, the bytes from which a block is large, and what it may keep of smaller ones
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE, _KEPT = -1, -3, 4 * 2**20, 32 * 2**20


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


def settle() -> None:
    """From now on take no more memory than is used: before it is foretold how much long work will take."""
    return_large_blocks()
    give_back()
