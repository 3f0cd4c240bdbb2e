"""A model in a GGUF file, with the configuration and tokenizer of its original beside it, as if it were plain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moqa.errors import MoqaError, one_line
from moqa.gguf.families import find_family, is_full
from moqa.gguf.parts import parts_of
from moqa.models.load import stored_shapes
from moqa.originals import OriginalReader
from moqa.originals.blocks import Blocks, Part
from moqa.storage.files import check_file
from moqa.tasks.names import depth

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig

# what a file may have that is no weight of the model
_COMPUTED = ("rope_freqs.weight",)


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder that holds no safetensors: one, or the parts of one model.

    >>> gguf_files(Path("reference/model"))
    []

    Raises:
        MoqaError: if they are those of several models, or a part is missing.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return []
    parts = parts_of(files[0])
    if files != parts:
        raise MoqaError(f"{folder} holds {len(files)} GGUF files", "leave those of one model")
    return parts


@dataclass(frozen=True)
class GgufMatrix:
    """A plain tensor that is, or is a part of, a tensor of a GGUF file.

    Attributes:
        shape: of the plain tensor.
        stored: the tensor of the file; experts are stacked.
        expert: index in the stack; None if it is all of the tensor.
        order: puts rows back into the original's order.
    """

    shape: tuple[int, ...]
    stored: "ReaderTensor"
    expert: int | None
    order: Tensor | None

    @property
    def parts(self) -> tuple[str, ...]:
        """No tensors of safetensors files."""
        return ()

    def read(self, part: Part) -> Tensor:  # noqa: ARG002
        """The plain tensor, float32."""
        from gguf.quants import dequantize

        data = self.stored.data if self.expert is None else self.stored.data[self.expert]
        found = torch.from_numpy(np.array(dequantize(data, self.stored.tensor_type))).float().reshape(self.shape)
        return found if self.order is None else found[self.order]


class GgufReader(OriginalReader):
    """Tensors of a folder with a GGUF file, by the names that they have in the original.

    Args:
        folder: with the file, `config.json` and the tokenizer.
        paths: of the file, or of its parts.
        config: of the model.

    Raises:
        MoqaError: if a file is damaged, belongs to another model, or moqa does not read its family or a type.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], config: "PretrainedConfig") -> None:
        self.folder = folder
        self._raw, self._files = {}, {}
        matrices = _matrices(paths, config)
        self._blocks: dict[str, Blocks] = dict(matrices)
        self._stored = {matrix.stored.name: matrix.stored for matrix in matrices.values()}
        self.headers = {name: {"dtype": "F32", "shape": [*blocks.shape]} for name, blocks in self._blocks.items()}

    @property
    def unit_bytes(self) -> int:
        """Bytes of the matrices of all layers."""
        return sum(
            int(tensor.n_bytes)
            for name, tensor in self._stored.items()
            if name.startswith("blk.") and not is_full(name, tuple(side for side in tensor.shape if side != 1))
        )


def _matrices(paths: Sequence[Path], config: "PretrainedConfig") -> Mapping[str, GgufMatrix]:
    family, layers, path = find_family(config), depth(config), paths[0]
    architecture, stored = _opened(paths)
    if architecture != family.architecture:
        raise MoqaError(f"{path} is a {architecture}", f"config.json beside it says {family.architecture}")
    found, unused = {}, dict(stored)
    for name, shape in stored_shapes(config).items():
        theirs, expert = family.name(name, layers), family.expert(name)
        tensor = stored.get(theirs)
        if tensor is None:
            raise MoqaError(f"{path} lacks {theirs}", f"a {config.model_type} needs it")
        unused.pop(theirs, None)
        sides = [int(side) for side in reversed(tensor.shape)]
        if [side for side in (sides if expert is None else sides[1:]) if side != 1] != [s for s in shape if s != 1]:
            raise MoqaError(f"{path}: {theirs} is {sides}", f"config.json beside it says {shape}")
        rows = torch.arange(shape[0])
        order = family.ordered(theirs, rows, config).argsort()
        found[name] = GgufMatrix(tuple(shape), tensor, expert, None if torch.equal(order, rows) else order)
    if extra := [name for name in unused if name not in _COMPUTED]:
        raise MoqaError(f"{path} holds {extra[0]}", f"a {config.model_type} with this config.json has no such tensor")
    return found


def _opened(paths: Sequence[Path]) -> tuple[str | None, "dict[str, ReaderTensor]"]:
    """Architecture and tensors of a model."""
    found: dict[str, ReaderTensor] = {}
    readers = [_reader(path) for path in paths]
    for number, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        part, count = _field(path, reader, "split.no") or 0, _field(path, reader, "split.count") or 1
        if (part, count) != (number, len(paths)):
            raise MoqaError(f"{path} is part {part + 1} of {count}", "name parts as llama-gguf-split does")
        for tensor in reader.tensors:
            if tensor.name in found:
                raise MoqaError(f"{path} holds {tensor.name}", "an earlier part does, too")
            found[tensor.name] = tensor
    total = _field(paths[0], readers[0], "split.tensors.count")
    if total is not None and total != len(found):
        raise MoqaError(f"{paths[0]} says that the model has {total} tensors", f"its parts hold {len(found)}")
    return _field(paths[0], readers[0], "general.architecture"), found


def _reader(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MoqaError(f"{path} needs the package gguf", "pip install 'moqa[gguf]'") from None
    try:
        check_file(path)
        return GGUFReader(path)
    except OSError as error:
        raise MoqaError(f"{path} cannot be read", error.strerror or str(error)) from None
    except Exception as error:  # it raises many kinds of errors for what it does not expect
        raise MoqaError(f"{path} is no sound GGUF file", one_line(error)) from None


def _field(path: Path, reader: "GGUFReader", name: str) -> Any:
    """A field that is no list; None if the file has none of this name."""
    field = reader.fields.get(name)
    try:
        return None if field is None else field.contents()
    except Exception as error:  # as above
        raise MoqaError(f"{path} is no sound GGUF file", one_line(error)) from None
