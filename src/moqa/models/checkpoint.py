"""A model folder as it lies on disk: its files, their tensors, and what identifies it."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moqa.errors import MoqaError

INDEX = "model.safetensors.index.json"
# Enough of every tensor to tell two trainings of one architecture apart without reading a checkpoint whole.
_FINGERPRINT_BYTES = 4096


def locate(model: str | Path) -> Path:
    """Folder of a model that is given as a local folder or as a Hub id.

    >>> locate("reference/model")
    PosixPath('reference/model')

    Args:
        model: a folder with `config.json` and safetensors files, or an id such as `allenai/OLMoE-1B-7B-0924`.

    Raises:
        MoqaError: if neither the folder nor the Hub has it.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MoqaError(f"{model} is a folder without config.json", "give the folder of a transformers checkpoint")
        return folder
    if folder.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise MoqaError(f"no model at {model}", "give a folder with config.json and safetensors, or a Hub id (org/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MoqaError(f"no folder {model}, and the Hub did not give it", reason) from None


def weight_files(folder: Path) -> list[Path]:
    """All safetensors files of a checkpoint, sorted; every file that its index names must be there.

    >>> weight_files(Path("reference/model"))
    [PosixPath('reference/model/model.safetensors')]

    Raises:
        MoqaError: if there are none, or the index names one that is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise MoqaError(f"{index} is not a safetensors index", str(error)) from None
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise MoqaError(f"{folder} holds no safetensors weights", "convert the checkpoint to safetensors first")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MoqaError(f"{folder} lacks {', '.join(missing)}", f"{INDEX} names {len(names)} files")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, dict]:
    """Header of one safetensors file: tensor name -> dtype, shape, data_offsets; the file's length is checked.

    >>> read_header(Path("reference/model/model.safetensors"))["model.norm.weight"]["shape"]
    [256]

    Raises:
        MoqaError: if the file is truncated or its header is not one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise MoqaError(f"{path} is truncated or not safetensors", f"{size} bytes cannot hold its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoqaError(f"{path} has a corrupted header", str(error)) from None
    if size != 8 + length + end:
        raise MoqaError(f"{path} is truncated or padded", f"{size} bytes, its header describes {8 + length + end}")
    return header


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint with its name on disk, one at a time, in the order of files and names.

    >>> sum(tensor.numel() for _, tensor in tensors(Path("reference/model")))
    22179328

    Raises:
        MoqaError: if a file is corrupted or a name occurs twice.
    """
    seen: dict[str, Path] = {}
    for path in weight_files(folder):
        read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in seen:
                        raise MoqaError(f"{folder} holds {name} twice", f"in {seen[name].name} and {path.name}")
                    seen[name] = path
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise MoqaError(f"{path} is corrupted", str(error)) from None


def check_finite(folder: Path) -> None:
    """Refuse a checkpoint with NaN or infinite weights.

    >>> check_finite(Path("reference/model"))

    Raises:
        MoqaError: naming the first such tensor and how many of its values are bad.
    """
    for name, tensor in tensors(folder):
        if tensor.is_floating_point() and tensor.element_size() > 1:
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise MoqaError(f"{folder}: tensor {name} has {bad} NaN or infinite values of {tensor.numel()}")


def fingerprint(folder: Path) -> str:
    """Hash that tells this model from any other: every tensor's name, dtype, shape and first bytes.

    >>> fingerprint(Path("reference/model"))[:8]
    '...'
    """
    digest = hashlib.sha256()
    for name, tensor in tensors(folder):
        flat = tensor.flatten()[: _FINGERPRINT_BYTES // tensor.element_size()].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
