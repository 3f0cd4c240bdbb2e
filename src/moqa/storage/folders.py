"""Folders that appear whole or not at all: written beside the target, renamed when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moqa.errors import MoqaError


@contextmanager
def finished_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block ends well, and is removed if it does not.

    >>> with finished_folder(Path("out")) as folder:
    ...     (folder / "moqa.json").write_text("{}")

    Args:
        out: the folder to make.
        overwrite: replace a folder that is there.

    Raises:
        MoqaError: if `out` exists and may not be replaced, or its parent cannot be written.
    """
    check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise MoqaError(f"{out} cannot be written", error.strerror or str(error)) from None
    try:
        yield folder
        put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path, out: Path) -> None:
    """Make a whole folder the result, in the place of one that may be there."""
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
    """Have a file's bytes, or a folder's names, on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace what is there unless told so; a folder that is no output of moqa is never replaced.

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
    """Whether something is there already; an empty folder is nothing.

    Raises:
        MoqaError: if nothing can be made there.
    """
    if out.name in ("", ".."):
        raise MoqaError(f"{out} is no name of a folder to make", "give its name, or its path")
    try:
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise MoqaError(f"{out} cannot be written", error.strerror or str(error)) from None
