"""Whether the disk holds what long work will put on it."""

import shutil
from pathlib import Path

from moqa.errors import MoqaError
from moqa.storage.resumable import folder_beside


def check_space(out: Path, needs: int) -> None:
    """Refuse work that its disk cannot hold, before anything of it is written.

    >>> check_space(Path("runs/out"), 10**15)
    Traceback (most recent call last):
    moqa.errors.MoqaError: runs/out needs about 9.31e+05 GiB, 57.1 GiB are free on its disk: free some, or choose ...

    Args:
        out: the folder to make.
        needs: bytes on the disk at the fullest moment; what an unfinished run has there already counts as free.

    Raises:
        MoqaError: naming both sizes.
    """
    try:
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
        disk = shutil.disk_usage(there)
        held = sum(path.stat().st_size for path in folder_beside(out).rglob("*") if path.is_file())
    except OSError:
        return  # one that cannot be asked says what is wrong when it is written to
    # /proc and its like say that they have no room at all
    if disk.total and needs > disk.free + held:
        raise MoqaError(
            f"{out} needs about {(needs - held) / 2**30:.3g} GiB, {disk.free / 2**30:.3g} GiB are free on its disk",
            "free some, or choose an -o on another disk",
        )
