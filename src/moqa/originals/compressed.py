"""compressed-tensors: integers of the format `pack-quantized`, in words, or of `int-quantized`, in bytes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.originals.blocks import Blocks, Part
from moqa.originals.words import unpack_words

_PACKED, _BYTES, _SCALE = ".weight_packed", ".weight", ".weight_scale"
_ZERO, _SHAPE = ".weight_zero_point", ".weight_shape"
# what a target may be instead of a name
_CLASS = "Linear"
_FORMATS, _BITS, _WORD = ("pack-quantized", "int-quantized"), (2, 4, 8), 32


@dataclass(frozen=True)
class CompressedTensor:
    """A matrix [out, in].

    Attributes:
        name: of the plain tensor.
        shape: of the plain tensor.
        bits: of each integer.
        packed: whether integers are in words, from which half of their range is taken, or bytes.
        has_zero: whether there are zero-points.
        has_shape: whether the shape is stored, too.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    packed: bool
    has_zero: bool
    has_shape: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        stem = self.name.removesuffix(".weight")
        suffixes = [_PACKED if self.packed else _BYTES, _SCALE]
        suffixes += [_ZERO] if self.has_zero else []
        suffixes += [_SHAPE] if self.has_shape else []
        return tuple(stem + suffix for suffix in suffixes)

    def read(self, part: Part) -> Tensor:
        """The plain tensor, float32."""
        stored, scale, *more = (part(name)[...] for name in self.parts)
        if self.has_shape and tuple(more[-1].tolist()) != self.shape:
            raise MoqaError(f"{self.parts[-1]} is {more[-1].tolist()}", f"{self.parts[0]} holds {[*self.shape]}")
        integers = unpack_words(stored, self.bits) - 2 ** (self.bits - 1) if self.packed else stored.long()
        scale = scale.float().reshape(-1, scale.shape[-1]) if scale.dim() else scale.float().reshape(1, 1)
        group = torch.arange(self.shape[1]) * scale.shape[1] // self.shape[1]
        if self.has_zero:
            offset = more[0]
            if self.packed:  # zero-points are packed along the rows
                offset = unpack_words(offset.T.contiguous(), self.bits)[:, : self.shape[0]].T - 2 ** (self.bits - 1)
            integers = integers - offset.long()[:, group]
        return integers * scale[:, group]


def find_compressed(folder: Path, headers: Mapping[str, dict], options: Mapping[str, Any]) -> dict[str, Blocks]:
    """Tensors of a model that are stored as compressed-tensors, by the names of the plain tensors.

    >>> shapes = {"q.weight_packed": [16, 8], "q.weight_scale": [16, 2]}
    >>> headers = {name: {"shape": shape} for name, shape in shapes.items()}
    >>> group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}
    >>> options = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    >>> find_compressed(Path("model"), headers, options)["q.weight"].shape
    (16, 64)

    Raises:
        MoqaError: naming what is missing, does not fit, or is a variant that moqa does not read.
    """
    form = options.get("format")
    if form not in _FORMATS:
        raise MoqaError(f"{folder} is compressed-tensors of format {form}", f"moqa reads {' and '.join(_FORMATS)}")
    packed, groups = form == "pack-quantized", list(_groups(folder, options))
    found: dict[str, Blocks] = {}
    for name in sorted(headers):
        if not name.endswith(_SCALE):
            continue
        stem = name.removesuffix(_SCALE)
        stored = stem + (_PACKED if packed else _BYTES)
        if stored not in headers:
            raise MoqaError(f"{folder} lacks {stored}", f"{name} belongs to it")
        bits = next((bits for target, bits in groups if _matches(target, stem)), None)
        if bits is None:
            raise MoqaError(f"{folder}: no group of config.json has {stem} as its target", "it has a scale")
        rows, columns = (*headers[stored]["shape"], 0, 0)[:2]
        shape = rows, columns * (_WORD // bits if packed else 1)
        scale = headers[name]["shape"]
        if scale and (len(scale) != 2 or scale[0] not in (1, rows) or not scale[1] or shape[1] % scale[1]):
            raise MoqaError(f"{folder}: {name} is {scale}", f"a matrix {[*shape]} needs whole groups")
        found[f"{stem}.weight"] = CompressedTensor(
            f"{stem}.weight", shape, bits, packed, has_zero=stem + _ZERO in headers, has_shape=stem + _SHAPE in headers
        )
    return found


def _groups(folder: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Target and bits of every group; names before classes of modules."""
    targets = []
    for name, group in dict(options.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if bits not in _BITS or kind != "int" or weights.get("actorder") in ("group", True):
            raise MoqaError(
                f"{folder}: {name} has weights of {bits} bits, type {kind}, actorder {weights.get('actorder')}",
                f"moqa reads integers of {', '.join(map(str, _BITS))} bits in the order of the inputs",
            )
        targets += [(str(target), int(bits)) for target in group.get("targets") or ()]
    return iter(sorted(targets, key=lambda one: one[0] == _CLASS))


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (_CLASS, module)
