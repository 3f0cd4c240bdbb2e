"""Files that others made: read only if they are files, and no more of them than any such file has."""

import errno
import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moqa.errors import MoqaError

# bytes: a tokenizer.json with a large vocabulary has a tenth; levels: a composite configuration has 6
MOST_TEXT, MOST_LEVELS = 2**28, 64


def check_file(path: Path, most: float = math.inf) -> None:
    """Refuse to open what is no regular file: a pipe would wait for ever, a device would never end.

    >>> check_file(Path("/dev/zero"))
    Traceback (most recent call last):
    OSError: [Errno 22] it is no regular file: '/dev/zero'

    Raises:
        OSError: if it is missing, something else, or has more than `most` bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes are more than {most}", str(path))


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that leads out of its folder: whoever copies it might publish a secret of this machine.

    >>> check_inside(Path("reference/model/config.json"), Path("reference/model"))

    Raises:
        OSError: see `check_file`, or if it is a link to anything but the folder's own files and the Hub's cache.
    """
    check_file(path, MOST_TEXT)
    target = path.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if path.is_symlink() and not cached and not target.is_relative_to(folder.resolve()):
        raise OSError(errno.EXDEV, "it is a link out of its folder: put a copy there", str(path))


def read_text(path: Path) -> str:
    """The text of a small file.

    >>> read_text(Path("reference/model/config.json"))[0]
    '{'

    Raises:
        OSError: see `check_file`.
        UnicodeDecodeError: if it is not UTF-8.
    """
    check_file(path, MOST_TEXT)
    return path.read_text(encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object whose numbers are numbers, and that is not nested deeply.

    >>> read_object(Path("reference/model/config.json"))["model_type"]
    'qwen3_moe'

    Raises:
        MoqaError: if it cannot be read, is something else, or holds NaN or an integer beyond 64 bits.
    """
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise MoqaError(f"{path} cannot be read", error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise MoqaError(f"{path} is not JSON", str(error)) from None
    if not isinstance(data, dict):
        raise MoqaError(f"{path} is not JSON that describes anything", "it must be an object in braces")
    for key, value, level in values_in(data):
        if level > MOST_LEVELS:
            raise MoqaError(f"{path} is nested in more than {MOST_LEVELS} levels", f"at {key}")
        if isinstance(value, float) and math.isnan(value):
            raise MoqaError(f"{path} has {key} NaN", "it must be a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise MoqaError(f"{path} has {key} of {value.bit_length()} bits", "no number is that large")
    return data


def values_in(data: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value in nested JSON with the key that it is under, and its level.

    >>> list(values_in({"sizes": [3]}))
    [('', {'sizes': [3]}, 0), ('sizes', [3], 1), ('sizes', 3, 2)]
    """
    todo = [("", data, 0)]
    while todo:
        key, value, level = todo.pop()
        yield key, value, level
        if isinstance(value, dict):
            todo += [(name, inner, level + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            todo += [(key, inner, level + 1) for inner in value]
