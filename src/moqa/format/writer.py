"""Write a checkpoint: into a folder beside the target, renamed when it is whole."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.artifact import checksum, read_json, write_json
from moqa.format.layout import Shard
from moqa.format.manifest import MANIFEST, Manifest, StoredFile
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
        folder.chmod(0o755)
        old = folder.with_suffix(".replaced")
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace what is there unless told so; a folder that is no output of moqa is never replaced.

    Raises:
        MoqaError: naming the folder.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise MoqaError(f"{out} exists", "choose another -o, or give --overwrite")
    if not out.is_dir() or not any((out / name).is_file() for name in ("moqa.json", "profile.json")):
        raise MoqaError(f"{out} exists and was not written by moqa", "--overwrite does not replace it")


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
    if length != shard.bytes:
        raise ValueError(f"{shard.file} has {length} bytes, {shard.bytes} were planned")
    return StoredFile(bytes=length, sha256=digest.hexdigest())


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a checkpoint's manifest with its checksum, so that the reader can tell a changed one."""
    write_json(manifest.model_copy(update={"checksum": checksum(manifest.model_dump(mode="json"))}), path)


def introduce(folder: Path) -> None:
    """Tell transformers what a finished checkpoint is: `config.json` names moqa, the index lists the kept tensors.

    The units are not in the index: moqa's quantizer for transformers maps them itself.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(config | {"quantization_config": {"quant_method": "moqa"}}, path)
    manifest = read_json(Manifest, folder / MANIFEST)
    first = min(manifest.files)
    total = {"total_size": sum(file.bytes for file in manifest.files.values())}
    write_json({"metadata": total, "weight_map": dict.fromkeys(manifest.kept, first)}, folder / INDEX)


def _parts(shard: Shard, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    yield shard.header()
    for name, (dtype, shape) in shard.entries.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {dtype} {shape}")
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
