"""The files that a large GGUF model is divided into."""

import re
from pathlib import Path

from moqa.errors import MoqaError

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """The files of the model that a file belongs to, in order; most models are one file.

    >>> parts_of(Path("qwen.gguf"))
    [PosixPath('qwen.gguf')]

    Args:
        path: of the model's file, or of any of its parts, which are named as `llama-gguf-split` names them:
            `NAME-00001-of-00003.gguf`.

    Raises:
        MoqaError: if a part is missing.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    name, _, count = found.groups()
    parts = [path.with_name(f"{name}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        raise MoqaError(f"{missing[0]} is missing", f"the model has {len(parts)} files: put them into one folder")
    return parts
