"""A safetensors file, opened to be read."""

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

# what disks ask for of places and memory when nothing lies between, and how much is read at once
_ALIGNED, _AT_ONCE = 4096, 8 * 2**20


class File:
    """Fills memory with a file's tensors.

    >>> with File(Path("model.safetensors")) as file:
    ...     file.fill(np.empty(8, np.uint8), 0)

    Args:
        path: of the file.
        once: its bytes are read but once. Those that lie in the system's memory are copied from there; others are not
            put there first, which takes the processor six times as long as to wait for the disk.

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
            begin: place of the first one behind the header, as `data_offsets` count.
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
        """Let the system read a range into its own memory; places count as those of `fill`."""
        if hasattr(os, "posix_fadvise"):  # nothing depends on it
            os.posix_fadvise(self._file.fileno(), self._data + begin, end - begin, os.POSIX_FADV_WILLNEED)


class _Direct:
    """Reads a file past the system's memory."""

    def __init__(self, path: Path, option: int) -> None:
        self._of_thread = local()
        self._mapped = np.memmap(path, np.uint8, "r")  # never touched: its pages are only asked for
        self._residency = _residency()
        self._descriptor = os.open(path, os.O_RDONLY | option)

    @property
    def _buffer(self) -> np.ndarray:
        """Memory of this thread that begins where a page does."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = np.frombuffer(mmap.mmap(-1, _AT_ONCE), np.uint8)
        return self._of_thread.buffer

    def close(self) -> None:
        os.close(self._descriptor)

    def is_cached(self, place: int, size: int) -> bool:
        """Whether all of it lies in the system's memory; not known where systems do not say so."""
        begin = place // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.zeros(-(-(place + size - begin) // mmap.PAGESIZE), np.uint8)
        found = self._residency(self._mapped.ctypes.data + begin, place + size - begin, pages.ctypes.data)
        return found == 0 and bool((pages & 1).all())

    def fill(self, out: np.ndarray, place: int) -> int:
        """Read to the end of `out`, or as far as it goes: how many bytes that is."""
        buffer, done = self._buffer, 0
        while done < len(out):
            begin = (place + done) // _ALIGNED * _ALIGNED
            skipped = place + done - begin
            wanted = min(-(-(skipped + len(out) - done) // _ALIGNED) * _ALIGNED, _AT_ONCE)
            try:
                count = os.preadv(self._descriptor, [buffer[:wanted].data], begin) - skipped
            except OSError as error:
                if error.errno == errno.EINVAL:  # the file system took the option, and does not know it
                    break
                raise
            if count <= 0:
                break
            count = min(count, len(out) - done)
            out[done : done + count] = buffer[skipped : skipped + count]
            done += count
        return done


def _open_direct(path: Path) -> _Direct | None:
    """None where the system, or the file system, has no such way."""
    option = getattr(os, "O_DIRECT", None)
    if option is None or path.stat().st_size == 0:
        return None
    try:
        return _Direct(path, option)
    except OSError:
        return None


def _residency() -> Callable[[int, int, int], int]:
    function: Any = ctypes.CDLL(None).mincore
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return function
