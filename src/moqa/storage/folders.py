"""Where results and what belongs to them are put, and when they are safe on the disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moqa.errors import MoqaError

# in a folder that was exported for another engine
EXPORT = "moqa-export.json"
# what may lie beside a result: its work folder, the result that it replaces, and a record that it is in place
PARTIAL, REPLACED, PLACED = "partial", "replaced", "placed"
# by which an output of moqa is known
_RECORDS = (
    "moqa.json",
    "profile.json",
    "adjustment.json",
    "mixture.json",
    "federated.json",
    "reduction.json",
    "merged.json",
    "rollout.json",
    EXPORT,
)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A `with` block that writes to a path.

    Raises:
        MoqaError: instead of an error of the system, naming the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise MoqaError(f"{out} cannot be written", error.strerror or str(error)) from None


def beside(out: Path, what: str) -> Path:
    """A hidden name beside a result.

    >>> beside(Path("runs/out"), PARTIAL)
    PosixPath('runs/.out.partial')

    Raises:
        MoqaError: if no folder can be made at `out`.
    """
    if out.name in ("", ".."):
        raise MoqaError(f"{out} is not the name of a new folder", "give a name or a path")
    return out.with_name(f".{out.name}.{what}")


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a complete folder to the result; an existing one is moved beside it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
    folder.chmod(0o755)
    old = beside(out, REPLACED)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, through to the disk (fsync)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace an existing result without `overwrite`, and anything that is not an output of moqa.

    A result that a killed run has put in place is not refused: the same command has to clean up (`resumable.tidy`).

    Raises:
        MoqaError: naming the folder.
    """
    if not is_taken(out) or beside(out, PLACED).is_file():
        return
    if not overwrite:
        raise MoqaError(f"{out} exists", "choose another -o, or give --overwrite")
    if not out.is_dir() or not any((out / name).is_file() for name in _RECORDS):
        raise MoqaError(f"{out} exists and was not written by moqa", "--overwrite does not replace it")


def is_taken(out: Path) -> bool:
    """Whether something exists at a path; an empty folder does not count.

    Raises:
        MoqaError: if no folder can be made there.
    """
    beside(out, PARTIAL)
    with writing(out):
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
