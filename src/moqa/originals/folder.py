"""A model folder on disk: its files and their tensors."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moqa.errors import MoqaError, UnreadableError
from moqa.originals.header import described_bytes, parse_unique
from moqa.originals.hub import INDEX, on_disk

_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
# values that are checked for NaN at a time
_CHECK_CHUNK = 2**22
# safetensors' names of dtypes
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def locate(model: str | Path) -> Path:
    """Folder of a model that is given as a local folder or as a Hub id.

    >>> locate("reference/model")
    PosixPath('reference/model')

    Args:
        model: a folder with `config.json` and safetensors files, or an id such as `allenai/OLMoE-1B-7B-0924`.

    Raises:
        MoqaError: if there is no such folder, and the Hub does not have it or cannot be reached; or if transformers
            would apply an adapter to its weights, or read others.
    """
    folder = on_disk(model)
    if (folder / _ADAPTER).is_file():
        raise MoqaError(
            f"{model} holds an adapter ({_ADAPTER}), which transformers applies to the weights",
            "merge it into them with PEFT's merge_and_unload, or remove the file to use the weights without it",
        )
    if folder == Path(model) and not (folder / "config.json").is_file():
        raise MoqaError(f"{model} is a folder without config.json", "give the folder of a transformers checkpoint")
    parts = sorted(path.name for path in folder.glob("shard-*-model-*-of-*.safetensors"))
    if parts:
        raise MoqaError(f"{model} holds {parts[0]}, a part of a distributed run", "save the whole model as safetensors")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, sorted; all files that the index names must exist.

    >>> weight_files(Path("reference/model"))
    [PosixPath('reference/model/model.safetensors')]

    Raises:
        MoqaError: if there are none, or the index names one that is missing.
    """
    index = _read_index(folder)
    names = [path.name for path in folder.glob(_SINGLE)] if index is None else sorted(set(index.values()))
    if not names:
        raise MoqaError(
            f"{folder} holds neither {_SINGLE} nor {INDEX}", "save the model with transformers as safetensors first"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MoqaError(f"{folder} lacks {', '.join(missing)}", f"{INDEX} names {len(names)} files")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, dict]:
    """Checked header of one safetensors file: tensor name -> dtype, shape, data_offsets.

    >>> read_header(Path("reference/model/model.safetensors"))["model.norm.weight"]["shape"]
    [256]

    Raises:
        MoqaError: if the file is truncated or its header is damaged; names the first tensor with a wrong entry.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > size - 8:
                raise MoqaError(f"{path} is truncated or not safetensors", f"{size} bytes cannot hold its header")
            text = file.read(length)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read", error.strerror or str(error)) from None
    try:
        header = parse_unique(text)
        header.pop("__metadata__", None)
        end = described_bytes(header, DTYPES)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MoqaError(f"{path} has a corrupted header", str(error)) from None
    if size != 8 + length + end:
        raise MoqaError(f"{path} is truncated or padded", f"{size} bytes, its header describes {8 + length + end}")
    return header


def headers(folder: Path) -> dict[str, dict]:
    """Headers of all files of a model as one, each entry with its `file`, checked against the index.

    >>> entry = headers(Path("reference/model"))["model.norm.weight"]
    >>> entry["dtype"], entry["file"]
    ('BF16', 'model.safetensors')

    Raises:
        MoqaError: if a file is corrupted, a name occurs twice, or the index does not match the files.
    """
    found: dict[str, dict] = {}
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if name in found:
                raise MoqaError(f"{folder} holds {name} twice", f"in {found[name]['file']} and {path.name}")
            found[name] = {**entry, "file": path.name}
    index = _read_index(folder)
    for name, file in (index or {}).items():
        if name not in found or found[name]["file"] != file:
            raise MoqaError(f"{folder / file} lacks {name}", f"{INDEX} lists it there")
    for name, entry in found.items():
        if index is not None and name not in index:
            file = entry["file"]
            raise MoqaError(f"{folder / file} holds {name}, but {INDEX} does not list it", "get both from one source")
    return found


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model with its name on disk, one at a time, in the order of files and names.

    >>> sum(tensor.numel() for _, tensor in tensors(Path("reference/model")))
    22179840

    Raises:
        MoqaError: if a file is corrupted or a name occurs twice.
    """
    headers(folder)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnreadableError(f"{path} cannot be read", str(error)) from None


def check_finite(folder: Path) -> None:
    """Refuse a model with NaN or infinite weights.

    >>> check_finite(Path("reference/model"))

    Raises:
        MoqaError: naming the first such tensor and how many of its values are bad.
    """
    for name, tensor in tensors(folder):
        refuse_bad(f"{folder}: tensor {name}", tensor)


def refuse_bad(what: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        MoqaError: naming the tensor and the number of such values.
    """
    if tensor.is_floating_point() and tensor.element_size() > 1:
        if not _may_be_bad(tensor):
            return
        bad = sum(len(part) - int(torch.isfinite(part).sum()) for part in tensor.flatten().split(_CHECK_CHUNK))
        if bad:
            raise MoqaError(f"{what} has {bad} NaN or infinite values of {tensor.numel()}")


def _may_be_bad(tensor: Tensor) -> bool:
    """Whether any value is NaN or infinite: true if the largest bit pattern of either sign reaches infinity."""
    size = tensor.element_size()
    signed = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy()
    if not signed.size:
        return False
    infinite = int(torch.tensor(math.inf, dtype=tensor.dtype).view(-1).view(torch.uint8).numpy().view(signed.dtype)[0])
    unsigned = signed.view(f"u{size}")
    return bool(signed.max() >= infinite or int(unsigned.max()) >= infinite + (1 << 8 * size - 1))


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if all tensors are in one file."""
    path = folder / INDEX
    if (folder / _SINGLE).is_file() or not path.is_file():
        return None
    try:
        index = parse_unique(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in index.values()):
            raise ValueError("weight_map names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise MoqaError(f"{path} is not a safetensors index", str(error)) from None
    return dict(index)
