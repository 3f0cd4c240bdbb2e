"""Configuration and tensors of a model folder, of any format that moqa reads."""

from pathlib import Path
from typing import TYPE_CHECKING

from moqa.models.gguf_reader import GgufReader, gguf_files
from moqa.models.load import read_config
from moqa.originals import OriginalReader
from moqa.originals.folder import weight_files
from moqa.originals.reader import IMPORTED
from moqa.storage.files import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def open_stored(folder: Path, imported: bool = False) -> tuple["PretrainedConfig", OriginalReader]:
    """Configuration and reader of a model folder.

    >>> config, stored = open_stored(Path("reference/model"))
    >>> stored.is_plain
    True

    Args:
        folder: of the model.
        imported: whether models that another tool has quantized are read, too: GPTQ, AWQ and compressed-tensors, and a
            GGUF model with the original's `config.json` and tokenizer beside it.

    Raises:
        MoqaError: see `read_config`, `OriginalReader` and `GgufReader`.
    """
    config = read_config(folder, imported=imported)
    paths = gguf_files(folder) if imported else []
    return config, GgufReader(folder, paths, config) if paths else OriginalReader(folder, imported)


def stored_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder.

    >>> stored_files(Path("reference/model"))
    [PosixPath('reference/model/model.safetensors')]

    Raises:
        MoqaError: if there are none.
    """
    return gguf_files(folder) or weight_files(folder)


def imported_format(folder: Path) -> str | None:
    """The format in which another tool has quantized the model of a folder; None if none has.

    >>> imported_format(Path("reference/model")) is None
    True
    """
    options = read_object(folder / "config.json").get("quantization_config")
    method = options.get("quant_method") if isinstance(options, dict) else None
    return "gguf" if gguf_files(folder) else str(method) if method in IMPORTED else None
