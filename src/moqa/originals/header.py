"""The header of a safetensors file, checked entry by entry before anything relies on it."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def parse_unique(text: str | bytes) -> Any:
    """Parse JSON in which no object has a key twice; Python's own parser would silently keep the last.

    >>> parse_unique('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: a is named twice

    Raises:
        ValueError: if it is not valid JSON, or a key occurs twice.
    """
    return json.loads(text, object_pairs_hook=_unique)


def described_bytes(entries: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors that a header describes; they must fill the file without gaps or overlaps.

    >>> described_bytes({"x": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}, {"F16": torch.float16})
    6

    Args:
        entries: tensor name -> its entry in the header.
        dtypes: known dtypes, by their names in a header.

    Raises:
        ValueError: naming the first tensor with a wrong entry.
    """
    places = sorted((*_place(name, entry, dtypes), name) for name, entry in entries.items())
    total = sum(stop - begin for begin, stop, _ in places)
    end, before = 0, ""
    for begin, stop, name in places:
        # without overlaps, a gap pushes the last tensor beyond the total size
        if stop > total:
            raise ValueError(f"{name} is at bytes {begin} to {stop}, but all tensors take {total}")
        if begin < end:
            raise ValueError(f"{name} at bytes {begin} to {stop} overlaps {before}, which ends at {end}")
        end, before = stop, name
    return total


def _place(name: str, entry: Any, dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """Offsets at which a tensor begins and ends."""
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


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is named twice")
        found[name] = value
    return found
