"""Temporary folders that do not outlive a kill for long."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "moqa-temporary-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder of this process, removed at the end; those of processes that were killed are removed first.

    >>> with temporary_folder() as folder:
    ...     folder.is_dir()
    True
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        lock = _locked(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:  # another process may have removed the folder before it was locked
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """An open folder, locked until it is closed or its process ends; None if another process has locked it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
