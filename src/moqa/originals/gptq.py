"""GPTQ and AWQ: integers with zero-points, their inputs in groups, stored transposed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.originals.blocks import Blocks, Part
from moqa.originals.words import unpack_words

_SUFFIXES = (".qweight", ".qzeros", ".scales")
_GPTQ_BITS, _AWQ_BITS = (2, 3, 4, 8), 4
# column of a word's eight that its nibbles hold, the lowest first
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Gptq:
    """A matrix [out, in] as GPTQ stores it: words [in * bits / 32, out].

    Attributes:
        name: of the plain tensor.
        shape: of the plain tensor.
        bits: of each integer.
        has_order: whether `g_idx` names the group of each input.
        offset: that is added to stored zero-points.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    has_order: bool
    offset: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        stem = self.name.removesuffix(".weight")
        suffixes = (*_SUFFIXES, ".g_idx") if self.has_order else _SUFFIXES
        return tuple(stem + suffix for suffix in suffixes)

    def read(self, part: Part) -> Tensor:
        """The plain tensor, float32."""
        words, zeros, scales, *order = (part(name)[...] for name in self.parts)
        integers = unpack_words(words.T.contiguous(), self.bits)[:, : self.shape[1]]
        # the largest zero-point less one was stored as the smallest
        zero = (unpack_words(zeros, self.bits)[:, : self.shape[0]] + self.offset) & (2**self.bits - 1)
        group = order[0].long() if order else torch.arange(self.shape[1]) // (self.shape[1] // len(scales))
        return (integers - zero.T[:, group]) * scales.float().T[:, group]


@dataclass(frozen=True)
class Awq:
    """A matrix [out, in] as AWQ stores it for its GEMM kernels: words [in, out / 8] of eight columns each.

    Attributes:
        name: of the plain tensor.
        shape: of the plain tensor.
    """

    name: str
    shape: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        return tuple(self.name.removesuffix(".weight") + suffix for suffix in _SUFFIXES)

    def read(self, part: Part) -> Tensor:
        """The plain tensor, float32."""
        words, zeros, scales = (part(name)[...] for name in self.parts)
        integers, zero = _ordered(words), _ordered(zeros)
        group = torch.arange(self.shape[1]) // (self.shape[1] // len(scales))
        return ((integers - zero[group]) * scales.float()[group]).T.contiguous()


def _ordered(words: Tensor) -> Tensor:
    """[rows, columns] of [rows, columns / 8] words."""
    fields = unpack_words(words, _AWQ_BITS).unflatten(1, (-1, len(_AWQ_ORDER)))
    columns = torch.empty_like(fields)
    columns[..., list(_AWQ_ORDER)] = fields
    return columns.flatten(1)


def find_gptq(folder: Path, headers: Mapping[str, dict], options: Mapping[str, Any]) -> dict[str, Blocks]:
    """Tensors of a model that are stored as GPTQ, by the names of the plain tensors.

    >>> shapes = {"q.qweight": [8, 16], "q.qzeros": [2, 2], "q.scales": [2, 16]}
    >>> headers = {name: {"shape": shape} for name, shape in shapes.items()}
    >>> find_gptq(Path("model"), headers, {"bits": 4})["q.weight"].shape
    (16, 64)

    Raises:
        MoqaError: naming what is missing, does not fit, or is a variant that moqa does not read.
    """
    bits = options.get("bits")
    if bits not in _GPTQ_BITS:
        raise MoqaError(f"{folder} is gptq of {bits} bits", f"moqa reads {', '.join(map(str, _GPTQ_BITS))}")
    # the first version stores zero-points less one
    offset = 0 if options.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, Blocks] = {}
    for stem, (words, zeros, scales) in _matrices(folder, headers).items():
        features, out = words[0] * 32 // bits, words[1]
        has_order = f"{stem}.g_idx" in headers
        if scales[1] != out or zeros[0] != scales[0] or zeros[1] * 32 // bits < out or features % scales[0]:
            raise MoqaError(f"{folder}: {stem}.scales is {scales}", f".qweight {words}, .qzeros {zeros} do not fit")
        found[f"{stem}.weight"] = Gptq(f"{stem}.weight", (out, features), bits, has_order, offset)
    return found


def find_awq(folder: Path, headers: Mapping[str, dict], options: Mapping[str, Any]) -> dict[str, Blocks]:
    """Tensors of a model that are stored as AWQ, by the names of the plain tensors.

    >>> shapes = {"q.qweight": [64, 2], "q.qzeros": [2, 2], "q.scales": [2, 16]}
    >>> headers = {name: {"shape": shape} for name, shape in shapes.items()}
    >>> find_awq(Path("model"), headers, {"bits": 4, "version": "gemm"})["q.weight"].shape
    (16, 64)

    Raises:
        MoqaError: naming what is missing, does not fit, or is a variant that moqa does not read.
    """
    bits, version = options.get("bits"), str(options.get("version", "gemm")).lower()
    if bits != _AWQ_BITS or version != "gemm":
        raise MoqaError(f"{folder} is awq of {bits} bits, version {version}", f"moqa reads {_AWQ_BITS} bits, gemm")
    found: dict[str, Blocks] = {}
    for stem, (words, zeros, scales) in _matrices(folder, headers).items():
        features, out = words[0], words[1] * len(_AWQ_ORDER)
        if scales[1] != out or zeros != [scales[0], words[1]] or features % scales[0]:
            raise MoqaError(f"{folder}: {stem}.scales is {scales}", f".qweight {words}, .qzeros {zeros} do not fit")
        found[f"{stem}.weight"] = Awq(f"{stem}.weight", (out, features))
    return found


def _matrices(folder: Path, headers: Mapping[str, dict]) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Name of each module -> shapes of its words, zero-points and scales."""
    stems = sorted({name.removesuffix(end) for name in headers for end in _SUFFIXES if name.endswith(end)})
    found = {}
    for stem in stems:
        missing = next((end for end in _SUFFIXES if stem + end not in headers), None)
        if missing is not None:
            raise MoqaError(f"{folder} lacks {stem}{missing}", f"{', '.join(_SUFFIXES)} belong together")
        words, zeros, scales = ([*headers[stem + end]["shape"]] for end in _SUFFIXES)
        if not len(words) == len(zeros) == len(scales) == 2 or not scales[0]:
            raise MoqaError(f"{folder}: {stem}.qweight is {words}", "it must be a matrix, and so must its scales")
        found[stem] = (words, zeros, scales)
    return found
