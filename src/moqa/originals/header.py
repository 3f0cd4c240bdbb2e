"""The header of a safetensors file, checked entry by entry before anything relies on it."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def parse_unique(text: str | bytes) -> Any:
    """JSON in which no object names anything twice; of two, the library would quietly take the last.

    >>> parse_unique('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: a is named twice

    Raises:
        ValueError: if it is none.
    """
    return json.loads(text, object_pairs_hook=_unique)


def described_bytes(entries: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors that a header describes, which must fill the file without a gap or an overlap.

    >>> described_bytes({"x": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}, {"F16": torch.float16})
    6

    Args:
        entries: tensor name -> what the header says of it.
        dtypes: that are known, by their names in a header.

    Raises:
        ValueError: naming the first tensor that cannot be right.
    """
    places = sorted((*_place(name, entry, dtypes), name) for name, entry in entries.items())
    total = sum(stop - begin for begin, stop, _ in places)
    end, before = 0, ""
    for begin, stop, name in places:
        # where nothing overlaps, a gap pushes the last tensor out of the range that all of them fill
        if stop > total:
            raise ValueError(f"{name} lies at bytes {begin} to {stop}, all tensors take {total}")
        if begin < end:
            raise ValueError(f"{name} at bytes {begin} to {stop} overlaps {before}, which ends at {end}")
        end, before = stop, name
    return total


def _place(name: str, entry: Any, dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """Where a tensor begins and ends."""
    lacking = {"dtype", "shape", "data_offsets"} - (entry.keys() if isinstance(entry, dict) else set())
    if lacking:
        raise ValueError(f"{name} has no {min(lacking)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{name} has dtype {dtype}, known are {', '.join(dtypes)}")
    if not _are_sizes(shape):
        raise ValueError(f"{name} has shape {shape}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has data_offsets {offsets}")
    needed = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{name} {shape} in {dtype} takes {needed} bytes, its data_offsets are {offsets}")
    return offsets[0], offsets[1]


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is named twice")
        found[name] = value
    return found
