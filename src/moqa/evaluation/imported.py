"""A model that another tool has quantized, as a folder that can be opened."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moqa.errors import MoqaError
from moqa.gguf.parts import parts_of
from moqa.originals import folder as original
from moqa.originals.hub import on_disk
from moqa.storage.files import check_inside
from moqa.storage.temporary import temporary_folder

_SUFFIX = ".gguf"
# what a GGUF file is opened with: configuration and tokenizer
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


@contextmanager
def folder_of(model: str | Path, against: str | Path | None) -> Iterator[Path]:
    """A `with` block with the folder of a model or checkpoint; of a GGUF file, one with its original's small files.

    >>> with folder_of("reference/model", None) as folder:
    ...     folder
    PosixPath('reference/model')

    Args:
        model: folder, Hub id, or path of a GGUF file or of one of its parts.
        against: the original, if it is known: its configuration and tokenizer are those of the file.

    Raises:
        MoqaError: if it or a part is missing, or a GGUF file comes without its original.
    """
    path = Path(model)
    if path.suffix != _SUFFIX or not path.is_file():
        yield on_disk(model)
        return
    if against is None:
        raise MoqaError(f"{model} has no config.json of transformers", "give the original with --against MODEL")
    folder, parts = original.locate(against), parts_of(path)
    with temporary_folder() as temporary:
        for companion in {file for pattern in _COMPANIONS for file in folder.glob(pattern)}:
            try:
                check_inside(companion, folder)
            except OSError as error:
                raise MoqaError(f"{companion} cannot be copied", error.strerror or str(error)) from None
            shutil.copyfile(companion, temporary / companion.name)
        for part in parts:
            (temporary / part.name).symlink_to(part.resolve())
        yield temporary
