"""Write a checkpoint: into a folder beside the target, renamed when it is whole."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.artifact import checksum, write_json
from moqa.format.layout import Shard
from moqa.format.manifest import CONFIG, Manifest, StoredFile
from moqa.models.checkpoint import INDEX


@contextmanager
def finished_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block ends well, and is removed if it does not.

    >>> with finished_folder(Path("out")) as folder:
    ...     (folder / "moqa.json").write_text("{}")

    Args:
        out: the folder to make.
        overwrite: replace a folder that is there.

    Raises:
        MoqaError: if `out` exists and may not be replaced, or its parent cannot be written.
    """
    check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise MoqaError(f"{out} cannot be written", error.strerror or str(error)) from None
    try:
        yield folder
        put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path, out: Path) -> None:
    """Make a whole folder the result, in the place of one that may be there."""
    for path in folder.rglob("*"):
        sync(path)
    folder.chmod(0o755)
    old = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace what is there unless told so; a folder that is no output of moqa is never replaced.

    Raises:
        MoqaError: naming the folder.
    """
    if not is_taken(out):
        return
    if not overwrite:
        raise MoqaError(f"{out} exists", "choose another -o, or give --overwrite")
    if not out.is_dir() or not any((out / name).is_file() for name in ("moqa.json", "profile.json", "adjustment.json")):
        raise MoqaError(f"{out} exists and was not written by moqa", "--overwrite does not replace it")


def is_taken(out: Path) -> bool:
    """Whether something is there already; an empty folder is nothing.

    Raises:
        MoqaError: if nothing can be made there.
    """
    if out.name in ("", ".."):
        raise MoqaError(f"{out} is no name of a folder to make", "give its name, or its path")
    try:
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise MoqaError(f"{out} cannot be written", error.strerror or str(error)) from None


def write_shard(folder: Path, shard: Shard, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write one file of a checkpoint, byte for byte as it was planned.

    Args:
        folder: where to.
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
        file.flush()
        os.fsync(file.fileno())
    if length != shard.bytes:
        raise ValueError(f"{shard.file} has {length} bytes, {shard.bytes} were planned")
    return StoredFile(bytes=length, sha256=digest.hexdigest())


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a checkpoint's manifest with its checksum and that of `config.json`: the reader can tell changed ones."""
    config = path.with_name(CONFIG)
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
    manifest = manifest.model_copy(update={"config": digest})
    write_json(manifest.model_copy(update={"checksum": checksum(manifest.model_dump(mode="json"))}), path)


def introduce(folder: Path) -> None:
    """Say in `config.json` that the checkpoint is moqa's, for transformers; before the manifest is written."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(config | {"quantization_config": {"quant_method": "moqa"}}, path)


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
