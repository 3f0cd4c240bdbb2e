"""Check that the disk has room for long work."""

import shutil
from pathlib import Path

from moqa.errors import MoqaError
from moqa.storage.resumable import folder_beside


def check_space(out: Path, needs: int) -> None:
    """Refuse work that does not fit on the disk, before anything is written.

    >>> check_space(Path("runs/out"), 10**16)
    Traceback (most recent call last):
    moqa.errors.MoqaError: runs/out needs about 9.31e+06 GiB, ... GiB are free on its disk: free some, or choose ...

    Args:
        out: the folder to make.
        needs: most bytes that the work has on the disk; files of an unfinished run count as free.

    Raises:
        MoqaError: naming both sizes.
    """
    try:
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
        disk = shutil.disk_usage(there)
        held = sum(path.stat().st_size for path in folder_beside(out).rglob("*") if path.is_file())
    except OSError:
        return  # writing will report what is wrong
    # /proc and similar file systems report a size of 0
    if disk.total and needs > disk.free + held:
        raise MoqaError(
            f"{out} needs about {(needs - held) / 2**30:.3g} GiB, {disk.free / 2**30:.3g} GiB are free on its disk",
            "free some, or choose an -o on another disk",
        )
