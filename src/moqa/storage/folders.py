"""Folders that appear complete or not at all: written next to the target and renamed when complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moqa.errors import MoqaError


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


@contextmanager
def finished_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the `with` block succeeds, and is removed if it fails.

    >>> with finished_folder(Path("runs/finished")) as folder:
    ...     _ = (folder / "moqa.json").write_text("{}")
    >>> Path("runs/finished/moqa.json").is_file()
    True

    Args:
        out: the folder to make.
        overwrite: replace an existing folder.

    Raises:
        MoqaError: if `out` exists and may not be replaced, or its parent cannot be written.
    """
    check_free(out, overwrite)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield folder
        put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a complete folder to the result, replacing an existing one."""
    for path in folder.rglob("*"):
        sync(path)
    folder.chmod(0o755)
    old = out.with_name(f".{out.name}.replaced")
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
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, through to the disk (fsync)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace an existing result without `overwrite`, and anything that is not an output of moqa.

    Raises:
        MoqaError: naming the folder.
    """
    if not is_taken(out):
        return
    if not overwrite:
        raise MoqaError(f"{out} exists", "choose another -o, or give --overwrite")
    if not out.is_dir() or not any((out / name).is_file() for name in ("moqa.json", "profile.json", "adjustment.json")):
        raise MoqaError(f"{out} exists and was not written by moqa", "--overwrite does not replace it")


def is_taken(out: Path) -> bool:
    """Whether something exists at a path; an empty folder does not count.

    Raises:
        MoqaError: if no folder can be made there.
    """
    if out.name in ("", ".."):
        raise MoqaError(f"{out} is not the name of a new folder", "give a name or a path")
    with writing(out):
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
