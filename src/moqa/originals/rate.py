"""How fast a model's files are read from where they lie."""

import time
from pathlib import Path

import numpy as np

from moqa.errors import MoqaError
from moqa.originals.file import File
from moqa.originals.folder import weight_files

# what is read of a file to see how fast its storage is: pieces from all over it
_PIECES, _PIECE = 32, 8 * 2**20


def storage_rate(folder: Path) -> float:
    """Bytes a second of reading the largest file as a run reads it: what lies in the system's memory comes from there.

    >>> storage_rate(Path("reference/model"))
    3.1e9

    Raises:
        MoqaError: if it can be read no more.
    """
    path = max(weight_files(folder), key=lambda path: path.stat().st_size)
    try:
        with File(path, once=True) as file:
            size = min(_PIECE, file.size)
            buffer = np.zeros(size, np.uint8)
            places = [(file.size - size) * piece // _PIECES for piece in range(_PIECES)]
            began = time.perf_counter()
            for place in places:
                file.fill(buffer, place)
            return len(places) * size / (time.perf_counter() - began)
    except OSError as error:
        raise MoqaError(f"{path} can be read no more", str(error)) from None
