"""Paths of other artifacts, as an artifact records them: what is published does not say where they are on a machine."""

import os
from pathlib import Path


def recorded(path: str | Path, folder: Path) -> str:
    """A path as it is recorded in a folder that may be published: as typed; an absolute one relative to the folder,
    or only its name where they share no parent folder.

    >>> recorded("reference/model", Path("runs/out")), recorded("/models/qwen", Path("/models/out"))
    ('reference/model', '../qwen')

    Args:
        path: as the user typed it; may be no path at all, such as a Hub id.
        folder: that the artifact is written to.
    """
    if not Path(path).is_absolute():
        return str(path)
    ends = os.path.realpath(path), os.path.realpath(folder)
    return Path(ends[0]).name if os.path.commonpath(ends) == os.sep else relative(path, folder)


def relative(path: str | Path, folder: Path) -> str:
    """A path as it is recorded in a folder that is not published: as typed; an absolute one relative to the folder.

    >>> relative("/models/qwen", Path("/models/out")), relative("/models/qwen", Path("/runs/profile"))
    ('../qwen', '../../models/qwen')

    Args:
        path: as the user typed it; may be no path at all, such as a Hub id.
        folder: that the artifact is written to.
    """
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder)) if Path(path).is_absolute() else str(path)


def label(path: str | Path) -> str:
    """A path in a table: as typed, or the name alone of an absolute one.

    >>> label("runs/out"), label("/models/out")
    ('runs/out', 'out')
    """
    return recorded(path, Path(path).parent)


def found(path: str, folder: Path) -> str:
    """A recorded path, relative to the working directory, or else to the folder, if there is something.

    >>> found("reference/model", Path("runs/out"))
    'reference/model'
    """
    beside = Path(os.path.normpath(folder.resolve() / path))
    return str(beside) if not Path(path).exists() and beside.exists() else path
