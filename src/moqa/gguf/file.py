"""A GGUF file: its tensors in order, how long it is before anything is written, and the writing of it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moqa.gguf.families import find_family
from moqa.gguf.types import GGML_BLOCKS
from moqa.gguf.vocabulary import write_vocabulary
from moqa.storage.temporary import temporary_folder
from moqa.tasks.configuration import read_configuration

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT = 32
# ggml's numbers of types that are no blocks
PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    >>> GgufTensor("blk.0.ffn_up_exps.weight", (16, 256, 256), "q4_k").bytes
    589824

    Attributes:
        name: llama.cpp's.
        shape: as in torch.
        kind: a name in `GGML_BLOCKS`, or the dtype of plain numbers.
    """

    name: str
    shape: tuple[int, ...]
    kind: str | torch.dtype

    @property
    def bytes(self) -> int:
        """Of its data."""
        rows, last = torch.Size(self.shape[:-1]).numel(), self.shape[-1]
        if isinstance(self.kind, torch.dtype):
            return rows * last * self.kind.itemsize
        return rows * last // GGML_BLOCKS[self.kind].weights * GGML_BLOCKS[self.kind].bytes

    @property
    def padded(self) -> int:
        """Bytes that it takes in the file."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class GgufFile:
    """A file for llama.cpp of one model.

    Attributes:
        folder: of the original.
        tensors: in the order of their data.
    """

    folder: Path
    tensors: Sequence[GgufTensor]

    @property
    def bytes(self) -> int:
        """Length of the file."""
        names = tuple((tensor.name, tensor.shape) for tensor in self.tensors)
        return _header_bytes(self.folder, names) + sum(tensor.padded for tensor in self.tensors)

    def write(self, path: Path, data: Iterable[Tensor]) -> None:
        """Write the file.

        Args:
            path: of the file.
            data: of the tensors in their order: blocks as bytes, others in their dtype.
        """
        writer = _described(self.folder, self.tensors)
        _write_header(writer, path)
        for tensor in data:
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
        writer.close()


def _described(folder: Path, tensors: Iterable[GgufTensor]) -> "GGUFWriter":
    """A writer that knows everything but the data."""
    from gguf import GGUFWriter, LlamaFileType

    config = read_configuration(folder)
    family = find_family(config)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = GGUFWriter(None, family.architecture)
    writer.add_name(config.model_type)  # no name of a folder: a plan says how long the file is wherever the model lies
    writer.add_quantized_by("moqa")
    writer.add_quantization_version(2)
    writer.add_file_type(LlamaFileType.GUESSED)  # types differ between tensors: readers look at these
    family.write_settings(writer, config)
    write_vocabulary(writer, folder, config.vocab_size)
    for tensor in tensors:
        number = PLAIN[tensor.kind] if isinstance(tensor.kind, torch.dtype) else GGML_BLOCKS[tensor.kind].number
        writer.add_tensor_info(tensor.name, tensor.shape, _no_dtype(), tensor.bytes, raw_dtype=_type(number))
    return writer


def _write_header(writer: "GGUFWriter", path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


@lru_cache(4)
def _header_bytes(folder: Path, names: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    """Bytes before the data; a tensor's type does not change them."""
    with temporary_folder() as temporary:
        path = temporary / "header.gguf"
        writer = _described(folder, [GgufTensor(name, shape, torch.float32) for name, shape in names])
        _write_header(writer, path)
        writer.close()
        return -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT


def _type(number: int) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number)


def _no_dtype() -> Any:
    """A dtype that tells the writer to take shapes as they are: those of weights, not of bytes."""
    import numpy as np

    return np.dtype(np.float32)
