"""Channels of the original, stored with a checkpoint so that an adjustment can give them more bits later."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, Field
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.layout import NAMED, Entry, Shard
from moqa.format.manifest import StoredFile
from moqa.format.writer import write_shard
from moqa.storage.artifact import check_signed, file_hash, read_json, signed, write_json

FOLDER, RECORD = "cache", "cache.json"
# on the Hub, where only what needs them downloads them
CACHE_FILES = f"{FOLDER}/*"


class CacheRecord(BaseModel, frozen=True):
    """The content of `cache/cache.json`."""

    fingerprint: str = Field(description="of the original model")
    share: float | None = Field(description="share of the channels that is kept; None: the whole original")
    layers: tuple[dict[str, tuple[str, tuple[int, ...]]], ...] = Field(
        description="of each decoder layer: tensor name -> dtype and shape"
    )
    files: dict[str, StoredFile]
    checksum: str = ""


@dataclass(frozen=True)
class Cache:
    """The cache of a checkpoint.

    >>> open_cache("runs/out", checkpoint.manifest.fingerprint).bytes
    40247424
    """

    folder: Path
    record: CacheRecord

    @property
    def whole(self) -> bool:
        """Whether it holds all of the original."""
        return self.record.share is None

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.bytes for file in self.record.files.values())

    @cached_property
    def _shards(self) -> list[Shard]:
        count = len(self.record.layers)
        return [
            _shard(i, count, {name: (NAMED[dtype], shape) for name, (dtype, shape) in tensors.items()})
            for i, tensors in enumerate(self.record.layers)
        ]

    def layer(self, index: int) -> dict[str, Tensor]:
        """A decoder layer's tensors, mapped and not copied.

        A whole original has the units by name. A part has `channel` [channels, 2] int32 (expert, channel), and
        [channels, hidden] rows of `gate_proj` and `up_proj` and columns of `down_proj`. In layers with experts, both
        have the channels' `significance` [experts, width] on the known distributions.
        """
        return self._shards[index].mapped(self.folder)

    def check(self, verify: bool) -> None:
        """Compare its files with the record: lengths and headers, and the hashes of all but a whole original.

        Args:
            verify: compare the hashes of a whole original, too.

        Raises:
            MoqaError: naming the file that differs.
        """
        for shard in self._shards:
            path, recorded = self.folder / shard.file, self.record.files.get(shard.file)
            if recorded is None or not path.is_file() or path.stat().st_size != shard.bytes:
                raise MoqaError(f"{path} is missing or truncated", f"{shard.bytes} bytes were written")
            with path.open("rb") as file:
                if file.read(len(shard.header())) != shard.header():
                    raise MoqaError(f"{path} has a different header than was written")
            # a whole original may be larger than memory; it is mapped, and only the needed channels are read
            if (verify or not self.whole) and file_hash(path) != recorded.sha256:
                raise MoqaError(f"{path} is corrupted", "its sha256 differs from the record's")


def _shard(layer: int, layers: int, entries: Mapping[str, Entry]) -> Shard:
    """A layer's file: the widest dtypes first, so that each tensor is aligned to its element size."""
    ordered = sorted(entries.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    return Shard(f"cache-{layer + 1:05d}-of-{layers:05d}.safetensors", dict(ordered))


def write_cache(
    folder: Path, fingerprint: str, share: float | None, depth: int, layers: Iterable[Mapping[str, Tensor]]
) -> dict[str, str]:
    """Write a checkpoint's cache.

    Args:
        folder: of the checkpoint, still being written.
        fingerprint: of the original model.
        share: of the channels; None for the whole original.
        depth: number of layers.
        layers: tensors of each of them, see `Cache.layer`.

    Returns:
        Hashes of its weight files, by path in the checkpoint's folder.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    described, files = [], {}
    for index, tensors in enumerate(layers):
        entries: dict[str, Entry] = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        shard = _shard(index, depth, entries)
        files[shard.file] = write_shard(target, shard, tensors)
        described.append({n: (str(dtype).removeprefix("torch."), shape) for n, (dtype, shape) in entries.items()})
    record = CacheRecord(fingerprint=fingerprint, share=share, layers=tuple(described), files=files)
    write_json(signed(record), target / RECORD)
    return {f"{FOLDER}/{name}": file.sha256 for name, file in files.items()}


def has_cache(folder: str | Path) -> bool:
    """Whether a checkpoint has a cache."""
    return (Path(folder) / FOLDER / RECORD).is_file()


def open_cache(folder: str | Path, fingerprint: str, verify: bool = False) -> Cache:
    """Open the cache of a checkpoint, made from the original with this fingerprint, and check it; see `Cache.check`.

    Raises:
        MoqaError: if the checkpoint has no cache, or it is damaged.
    """
    path = Path(folder) / FOLDER
    if not has_cache(folder):
        raise MoqaError(f"{folder} has no channel cache", "quantize with --cache 1% or --cache full")
    record = read_json(CacheRecord, path / RECORD)
    check_signed(path / RECORD, record.checksum)
    if record.fingerprint != fingerprint:
        raise MoqaError(f"{path} is of another model ({record.fingerprint[:8]})", f"{folder} is of {fingerprint[:8]}")
    cache = Cache(path, record)
    cache.check(verify)
    return cache
