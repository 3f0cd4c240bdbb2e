"""The tensors of a model folder, as if all of them were plain."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.originals import folder as original
from moqa.originals.blocks import Blocks, Part
from moqa.originals.compressed import CompressedTensor, find_compressed
from moqa.originals.file import File
from moqa.originals.fp8 import find_fp8
from moqa.originals.gptq import Awq, Gptq, find_awq, find_gptq
from moqa.originals.mxfp4 import find_mxfp4
from moqa.storage.files import read_object

Find = Callable[[Path, Mapping[str, dict], Mapping[str, Any]], dict[str, Blocks]]
# `quant_method` of config.json -> function that finds the tensors in this format
FORMATS: dict[str, Find] = {"fp8": find_fp8, "mxfp4": find_mxfp4}
# those of models that other tools have quantized: to be compared, not to be quantized again
IMPORTED: dict[str, Find] = {"gptq": find_gptq, "awq": find_awq, "compressed-tensors": find_compressed}
# a scale of 16 bits times an integer needs more than 16
_EXACT_IN_32 = (Gptq, Awq, CompressedTensor)


def find_format(folder: Path, options: Mapping[str, Any], imported: bool = False) -> Find:
    """The reader of a format that `quantization_config` names.

    Args:
        folder: of the model, for messages.
        options: `quantization_config`.
        imported: whether models that another tool has quantized are read, too.

    >>> find_format(Path("model"), {"quant_method": "mxfp4"}).__name__
    'find_mxfp4'

    Raises:
        MoqaError: if moqa does not read this format.
    """
    method = str(options.get("quant_method", "unknown"))
    if imported and method in IMPORTED:
        return IMPORTED[method]
    if method not in FORMATS:
        if imported:
            known = ", ".join((*FORMATS, *IMPORTED))
            raise MoqaError(f"{folder} is quantized in an unknown format ({method})", f"moqa reads {known}")
        formats = " or ".join(FORMATS)
        raise MoqaError(f"{folder} is already quantized ({method})", f"give the original: 16 or 32 bits, {formats}")
    return FORMATS[method]


class OriginalReader:
    """Tensors of a model folder; those that are stored otherwise appear as the plain tensors that they stand for.

    >>> OriginalReader(Path("reference/model")).headers["model.norm.weight"]["shape"]
    [256]

    Args:
        folder: of the model.
        imported: whether models that another tool has quantized are read, too.

    Attributes:
        folder: of the model.
        headers: tensor name -> dtype and shape, as safetensors name them.

    Raises:
        MoqaError: if a file is corrupted, moqa does not read the format, or blocks and scales do not fit each other.
    """

    def __init__(self, folder: Path, imported: bool = False) -> None:
        self.folder = folder
        self._raw = raw = original.headers(folder)
        self._files = {name: folder / entry["file"] for name, entry in raw.items()}
        self._blocks = _find_blocks(folder, raw, imported)
        parts = {part for blocks in self._blocks.values() for part in blocks.parts}
        self.headers = {name: entry for name, entry in raw.items() if name not in parts}
        for name, blocks in self._blocks.items():
            # bytes of integers have the name of the plain tensor
            if name in self.headers and name not in parts:
                raise MoqaError(f"{folder} holds {name} twice", f"plain, and as {blocks.parts[0]}")
            self.headers[name] = {
                "dtype": "F32" if isinstance(blocks, _EXACT_IN_32) else "BF16",
                "shape": list(blocks.shape),
            }

    @property
    def is_plain(self) -> bool:
        """Whether all tensors are stored as they are."""
        return not self._blocks

    @property
    def values(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(entry["shape"]) for entry in self.headers.values())

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors into the page cache in the background.

        >>> OriginalReader(Path("reference/model")).ahead(["model.norm.weight"])
        """
        by_file: dict[Path, list[list[int]]] = {}
        for name in names:
            for part in self._blocks[name].parts if name in self._blocks else (name,):
                by_file.setdefault(self._files[part], []).append(self._raw[part]["data_offsets"])
        for path, places in by_file.items():
            with File(path) as file:
                for begin, end in places:
                    file.ahead(begin, end)

    @contextmanager
    def opened(self, once: bool = False) -> Iterator[Callable[[str], "LazyTensor"]]:
        """A `with` block in which tensors can be read by name.

        >>> with OriginalReader(Path("reference/model")).opened() as on_disk:
        ...     on_disk("model.norm.weight")[...].dtype
        torch.bfloat16

        Args:
            once: bypass the page cache, see `File`; what `ahead` has read is taken from the cache.
        """
        with ExitStack() as stack:
            files: dict[Path, File] = {}

            def part(name: str) -> LazyTensor:
                path = self._files[name]
                if path not in files:
                    files[path] = stack.enter_context(File(path, once))
                return LazyTensor(f"{self.folder}: tensor {name}", _Place(files[path], self._raw[name]))

            def on_disk(name: str) -> LazyTensor:
                if name not in self._blocks:
                    return part(name)
                return LazyTensor(f"{self.folder}: tensor {name}", _Joined(self._blocks[name], part))

            yield on_disk


class LazyTensor:
    """A tensor of the original that is read, and checked for NaN, when it is indexed.

    Attributes:
        what: folder and name, for messages.
    """

    def __init__(self, what: str, place: "_Readable") -> None:
        self.what, self._place = what, place

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._place[index]
        original.refuse_bad(self.what, tensor)
        return tensor

    def read_into(self, out: Tensor) -> None:
        """Fill a contiguous tensor of the same shape, without a copy if it has the same dtype.

        >>> with OriginalReader(Path("reference/model")).opened() as on_disk:
        ...     on_disk("model.norm.weight").read_into(torch.empty(256))
        """
        self._place.read_into(out)
        original.refuse_bad(self.what, out)


class _Readable(Protocol):
    def __getitem__(self, index: Any) -> Tensor: ...

    def read_into(self, out: Tensor) -> None: ...


class _Place:
    """A plain tensor in an open file; not mapped, because mapped pages count as memory of this process."""

    def __init__(self, file: File, entry: Mapping[str, Any]) -> None:
        self._file, self._begin = file, entry["data_offsets"][0]
        self._shape, self._dtype = entry["shape"], original.DTYPES[entry["dtype"]]

    def __getitem__(self, index: Any) -> Tensor:
        wanted = torch.empty(self._shape, dtype=self._dtype, device="meta")[index]
        if not wanted.is_contiguous():
            return self[...][index]
        out = torch.empty(wanted.shape, dtype=self._dtype)
        self._fill(out, int(wanted.storage_offset()))
        return out

    def read_into(self, out: Tensor) -> None:
        if out.dtype == self._dtype:
            self._fill(out, 0)
        else:
            out.copy_(self[...])

    def _fill(self, out: Tensor, first: int) -> None:
        self._file.fill(out.view(-1).view(torch.uint8).numpy(), self._begin + first * self._dtype.itemsize)


class _Joined:
    """A tensor that is computed from its parts when it is indexed."""

    def __init__(self, blocks: Blocks, part: Part) -> None:
        # files are opened here: transformers may index in several threads
        self._blocks, self._parts = blocks, {name: part(name) for name in blocks.parts}

    def __getitem__(self, index: Any) -> Tensor:
        return self._blocks.read(self._parts.__getitem__)[index]

    def read_into(self, out: Tensor) -> None:
        out.copy_(self[...])


def _find_blocks(folder: Path, headers: Mapping[str, dict], imported: bool) -> dict[str, Blocks]:
    options = read_object(folder / "config.json").get("quantization_config")
    if not options:
        return {}
    if not isinstance(options, dict):
        raise MoqaError(f"{folder} has a quantization_config of {options}", "it must be a JSON object")
    found = find_format(folder, options, imported)(folder, headers, options)
    if not found:
        method = options["quant_method"]
        raise MoqaError(f"{folder} has no tensor in {method}", "remove quantization_config from its config.json")
    return found
