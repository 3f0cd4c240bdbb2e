"""Memory of mapped files: given back to the system while nothing reads it."""

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_DONT_NEED = 4


def drop(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of mapped tensors; their next use reads it again from the page cache or the disk.

    >>> drop(checkpoint.layer(0).values())

    Whole pages inside of a tensor are given back. Only for tensors that were never written to: others would lose what
    was written.

    Args:
        tensors: mapped from files, as a checkpoint's are (`Shard.mapped`).
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise
    files = _file_maps()
    for tensor in tensors:
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(low <= first and last <= high for low, high in files):
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


def _file_maps() -> list[tuple[int, int]]:
    """Addresses of this process that are mapped from weight files: what is not must keep its content."""
    found = []
    with Path("/proc/self/maps").open(encoding="utf-8") as lines:
        for line in lines:
            if line.rstrip().endswith(".safetensors"):
                low, _, high = line.split(" ", 1)[0].partition("-")
                found.append((int(low, 16), int(high, 16)))
    return found
