"""How fast the storage of a model's files is."""

import time
from pathlib import Path

import numpy as np

from moqa.errors import MoqaError
from moqa.originals.file import File
from moqa.originals.folder import weight_files

# the rate is measured on this many pieces of a file, evenly spaced, and each of this size
_PIECES, _PIECE = 32, 8 * 2**20


def storage_rate(folder: Path) -> float:
    """Bytes per second at which a run reads the largest file; what is in the page cache is read from there.

    >>> storage_rate(Path("reference/model")) > 1e6
    True

    Raises:
        MoqaError: if the file can no longer be read.
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
        raise MoqaError(f"{path} can no longer be read", str(error)) from None
