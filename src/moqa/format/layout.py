"""Which tensor is in which shard, and exactly how long every file is: planned here, written by `writer`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moqa.format.scheme import Scheme

# safetensors' names of the dtypes that a checkpoint stores
DTYPES = {
    torch.uint8: "U8", torch.bool: "BOOL", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
}  # fmt: skip
# the same dtypes by the names that records give them
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
ALIGNMENT = 64
_DIGITS = 15  # of the largest offset in a file

Entry = tuple[torch.dtype, tuple[int, ...]]


class StoredAs(Protocol):
    """How a unit is stored: a scheme, or a rounding of a nested width."""

    def tensors(self, shape: tuple[int, int]) -> dict[str, Entry]:
        """Dtype and shape of every tensor that stores a unit of [out, in] weights, by suffix."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name and its tensors in the order of their bytes.

    >>> Shard("model-00001-of-00007.safetensors", {"model.norm.weight": (torch.bfloat16, (256,))}).bytes
    704
    """

    file: str
    entries: dict[str, Entry]

    def header(self) -> bytes:
        """The file's first bytes, up to its data: a length and JSON, with each entry padded with spaces."""
        last = next(reversed(self.entries), None)
        offset, parts = 0, [b"{".ljust(ALIGNMENT - 8)]
        for name, entry in self.entries.items():
            end = offset + entry_bytes(entry)
            comma = b"," if name != last else b""
            text = _describe(name, entry, f"{offset},{end}") + comma
            parts.append(text.ljust(header_bytes(name, entry)))
            offset = end
        text = b"".join(parts)[:-1] + b"}"
        return len(text).to_bytes(8, "little") + text

    def mapped(self, folder: Path) -> dict[str, Tensor]:
        """Its tensors in the file of a folder, mapped and not copied."""
        data = torch.from_file(str(folder / self.file), shared=False, size=self.bytes, dtype=torch.uint8)
        tensors, begin = {}, len(self.header())
        for name, entry in self.entries.items():
            end = begin + entry_bytes(entry)
            tensors[name] = data[begin:end].view(entry[0]).view(entry[1])
            begin = end
        return tensors

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return len(self.header()) + sum(entry_bytes(entry) for entry in self.entries.values())


def entry_bytes(entry: Entry) -> int:
    """Bytes of one tensor."""
    return entry[0].itemsize * math.prod(entry[1])


def shards(
    kept: Mapping[str, Entry],
    layers: int,
    units: Mapping[str, tuple[int, tuple[int, int], StoredAs]],
    name: str = "model",
) -> list[Shard]:
    """All files of a checkpoint: one for tensors that are kept, and one per layer for its units.

    >>> [shard.file for shard in shards({}, 1, {})]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']

    Args:
        kept: tensors stored unchanged, by name.
        layers: decoder layers of the model.
        units: unit name -> layer, [out, in] shape and scheme.
        name: that files begin with.

    Returns:
        Shards whose tensors are ordered by the power of two that divides their bytes, then by name: so each is aligned
        to its element size, and packed planes to 64 bytes.
    """
    stored: list[dict[str, Entry]] = [dict(kept)] + [{} for _ in range(layers)]
    for unit, (layer, shape, scheme) in units.items():
        for suffix, entry in scheme.tensors(shape).items():
            stored[layer + 1][f"{unit}.{suffix}"] = entry
    return [
        Shard(f"{name}-{number:05d}-of-{len(stored):05d}.safetensors", aligned(tensors))
        for number, tensors in enumerate(stored, 1)
    ]


def header_bytes(name: str, entry: Entry) -> int:
    """Bytes of a tensor's entry in the header of its file.

    A multiple of 64 that does not depend on the tensor's offset: so headers keep the data aligned, and the length of a
    file is a plain sum over its tensors, which a plan can add up before anything is written.
    """
    longest = len(_describe(name, entry, "")) + 2 * _DIGITS + len(",,}")
    return -(-longest // ALIGNMENT) * ALIGNMENT


def unit_bytes(name: str, shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes that a unit adds to its file: its tensors and their entries in the header."""
    return sum(
        entry_bytes(entry) + header_bytes(f"{name}.{suffix}", entry) for suffix, entry in scheme.tensors(shape).items()
    )


def _describe(name: str, entry: Entry, offsets: str) -> bytes:
    shape = ",".join(map(str, entry[1]))
    return f'{json.dumps(name)}:{{"dtype":"{DTYPES[entry[0]]}","shape":[{shape}],"data_offsets":[{offsets}]}}'.encode()


def aligned(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries ordered by the power of two that divides their bytes, then by name."""
    return dict(sorted(entries.items(), key=lambda item: (-math.gcd(entry_bytes(item[1]), ALIGNMENT), item[0])))
