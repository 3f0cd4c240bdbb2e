"""Write the files of a checkpoint, byte for byte as they were planned."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moqa.format.layout import Shard
from moqa.format.manifest import CARD, CONFIG, Manifest, StoredFile
from moqa.originals.hub import INDEX
from moqa.storage.artifact import file_hash, signed, write_json, write_whole

NOT_A_FILE = "made-by-moqa--pip-install-moqa-to-load-it.safetensors"


def write_shard(folder: Path, shard: Shard, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write one file of a checkpoint, byte for byte as it was planned.

    Args:
        folder: to write it to.
        shard: its layout.
        tensors: name -> tensor, exactly those of the layout.

    Returns:
        Length and hash of the file.

    Raises:
        ValueError: if a tensor is missing, unplanned, or of another dtype or shape.
    """
    if tensors.keys() != shard.entries.keys():
        raise ValueError(f"{shard.file}: {sorted(tensors.keys() ^ shard.entries.keys())[0]} is missing or not planned")
    digest, length = hashlib.sha256(), 0
    with (folder / shard.file).open("wb") as file:
        for part in _parts(shard, tensors):
            digest.update(part)
            length += len(part)
            file.write(part)
    if length != shard.bytes:
        raise ValueError(f"{shard.file} has {length} bytes, {shard.bytes} were planned")
    return StoredFile(bytes=length, sha256=digest.hexdigest())


def stored_file(path: Path) -> StoredFile:
    """Length and hash of a file that is already written."""
    return StoredFile(bytes=path.stat().st_size, sha256=file_hash(path))


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a checkpoint's manifest last: with hashes of all other files beside it, and its own checksum."""
    others = {path, path.with_name(CARD), *(path.with_name(name) for name in manifest.weight_files)}
    companions = {
        file.relative_to(path.parent).as_posix(): stored_file(file)
        for file in sorted(path.parent.rglob("*"))
        # the cache has a record of its files of its own
        if file.is_file() and file not in others and (file.suffix != ".safetensors" or file.parent == path.parent)
    }
    config = companions[CONFIG].sha256 if CONFIG in companions else ""
    write_json(signed(manifest.model_copy(update={"config": config, "companions": companions})), path)


def introduce(folder: Path, recipe: Mapping[str, object]) -> None:
    """Mark `config.json` as moqa's, for transformers, and say how it was made; call it before the manifest is written.

    A transformers that does not know moqa only warns about the unknown method, and loads random units. So the weights
    are said to be in a file that does not exist and whose name says what to do; `integrations/transformers.py` ignores
    it.
    """
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"quantization_config": {"quant_method": "moqa", **recipe}, "transformers_weights": NOT_A_FILE}
    # in the original's order: a policy of lerobot has its cameras in the order in which they are written
    write_whole(path, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def write_index(manifest: Manifest, folder: Path) -> None:
    """List the kept tensors for transformers; moqa's quantizer maps the units itself."""
    total = {"total_size": sum(file.bytes for file in manifest.files.values())}
    write_json({"metadata": total, "weight_map": dict.fromkeys(manifest.kept, min(manifest.files))}, folder / INDEX)


def _parts(shard: Shard, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield shard.header()
    for name, (dtype, shape) in shard.entries.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {dtype} {shape}")
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data
