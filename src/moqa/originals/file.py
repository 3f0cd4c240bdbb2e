"""Read a safetensors file, past the page cache where that is faster."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any

import numpy as np

# direct reads need offsets and memory that are multiples of _ALIGNMENT; bytes of one such read
_ALIGNMENT, _READ_SIZE = 4096, 8 * 2**20


class File:
    """Reads the tensors of a file into given memory.

    >>> out = np.zeros(8, np.uint8)
    >>> with File(Path("reference/model/model.safetensors")) as file:
    ...     file.fill(out, 0)
    >>> bool(out.any())
    True

    Args:
        path: of the file.
        once: its bytes are read only once. What is in the page cache is copied from there; the rest is read directly
            (O_DIRECT), because going through the page cache costs six times the processor time.

    Attributes:
        size: bytes of all tensors.

    Raises:
        OSError: if it cannot be opened or read, or ends too early.
    """

    def __init__(self, path: Path, once: bool = False) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._data = 8 + int.from_bytes(self._file.read(8), "little")
        self.size = path.stat().st_size - self._data
        self._direct = _open_direct(path) if once else None

    def __enter__(self) -> "File":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._direct is not None:
            self._direct.close()

    def fill(self, out: np.ndarray, begin: int) -> None:
        """Read as many bytes as `out` holds.

        Args:
            out: [bytes] uint8, contiguous.
            begin: offset of the first byte after the header, as in `data_offsets`.
        """
        place, direct = self._data + begin, self._direct
        if direct is not None and not direct.is_cached(place, len(out)):
            done = direct.fill(out, place)
            out, place = out[done:], place + done
        while len(out):
            count = os.preadv(self._file.fileno(), [out.data], place)
            if not count:
                raise OSError(f"{self._path} ends at {place}")
            out, place = out[count:], place + count

    def ahead(self, begin: int, end: int) -> None:
        """Ask the system to read a range into the page cache; offsets as in `fill`."""
        os.posix_fadvise(self._file.fileno(), self._data + begin, end - begin, os.POSIX_FADV_WILLNEED)


class _Direct:
    """Reads a file without the page cache (O_DIRECT)."""

    def __init__(self, path: Path) -> None:
        self._of_thread = local()
        self._mapped = np.memmap(path, np.uint8, "r")  # never read: only for asking which pages are cached
        self._residency = _residency()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    @property
    def _buffer(self) -> np.ndarray:
        """Page-aligned memory of this thread."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = np.frombuffer(mmap.mmap(-1, _READ_SIZE), np.uint8)
        return self._of_thread.buffer

    def close(self) -> None:
        os.close(self._descriptor)

    def is_cached(self, place: int, size: int) -> bool:
        """Whether the whole range is in the page cache; False where the system does not tell."""
        begin = place // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.zeros(-(-(place + size - begin) // mmap.PAGESIZE), np.uint8)
        status = self._residency(self._mapped.ctypes.data + begin, place + size - begin, pages.ctypes.data)
        return status == 0 and bool((pages & 1).all())

    def fill(self, out: np.ndarray, place: int) -> int:
        """Read as much of `out` as direct reads can; returns how many bytes that is."""
        buffer, done = self._buffer, 0
        while done < len(out):
            begin = (place + done) // _ALIGNMENT * _ALIGNMENT
            skipped = place + done - begin
            wanted = min(-(-(skipped + len(out) - done) // _ALIGNMENT) * _ALIGNMENT, _READ_SIZE)
            try:
                count = os.preadv(self._descriptor, [buffer[:wanted].data], begin) - skipped
            except OSError as error:
                if error.errno == errno.EINVAL:  # the file system accepted O_DIRECT but does not support it
                    break
                raise
            if count <= 0:
                break
            count = min(count, len(out) - done)
            out[done : done + count] = buffer[skipped : skipped + count]
            done += count
        return done


def _open_direct(path: Path) -> _Direct | None:
    """None where the file system does not support direct reads."""
    if path.stat().st_size == 0:
        return None
    try:
        return _Direct(path)
    except OSError:
        return None


def _residency() -> Callable[[int, int, int], int]:
    function: Any = ctypes.CDLL(None).mincore
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return function
