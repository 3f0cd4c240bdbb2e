"""FP8 as in DeepSeek-V3, Qwen3 and MiniMax: 8-bit floats with a scale for every block of a matrix."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.originals.blocks import Blocks, Part, as_float, bands, unpack_e2m1

# two 4-bit floats in a byte: DeepSeek-V4's experts, whose blocks are those of MXFP4
_PACKED, _PACKED_BLOCK = "I8", (1, 32)
_WEIGHTS = ("F8_E4M3", "F8_E5M2", _PACKED)
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8:
    """A matrix, or a stack of matrices, of 8-bit floats.

    >>> stored = {"weight": torch.ones(300, 200).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 2)}
    >>> Fp8(("weight", "weight_scale_inv"), (300, 200), (128, 128)).read(stored.__getitem__).dtype
    torch.bfloat16

    Numbers and scales are multiplied in float32 and rounded to bfloat16, as in transformers.

    Attributes:
        parts: names on disk of the numbers, [..., rows, columns], of the scales, [..., blocks, blocks], and of scales
            of activations, which are not used.
        shape: of the plain tensor.
        block: rows and columns that share a scale; the last blocks may be partial.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    block: tuple[int, int]

    def read(self, part: Part) -> Tensor:
        """The plain tensor, bfloat16."""
        numbers, scales = part(self.parts[0]), as_float(part(self.parts[1])[...])
        *stack, rows, columns = self.shape
        across = torch.arange(columns) // self.block[1]
        whole = torch.empty(self.shape, dtype=torch.bfloat16)
        matrices = whole.view(math.prod(stack), rows, columns)
        grids = scales.reshape(math.prod(stack), *_grid(self.shape, self.block)[-2:])
        for index, matrix, grid in zip(product(*map(range, stack)), matrices, grids, strict=True):
            for some in bands(rows, columns):
                stored = numbers[(*index, some)]
                values = unpack_e2m1(stored) if stored.dtype == torch.int8 else stored.float()
                down = torch.arange(some.start, some.stop) // self.block[0]
                matrix[some] = values * grid[down][:, across]
        return whole


def find_fp8(folder: Path, headers: Mapping[str, dict], options: Mapping[str, Any]) -> dict[str, Blocks]:
    """Tensors of a model that are stored as FP8, by name.

    >>> weight, scales = {"dtype": "F8_E4M3", "shape": [300, 200]}, {"dtype": "F32", "shape": [3, 2]}
    >>> find_fp8(Path("model"), {"q_proj.weight": weight, "q_proj.weight_scale_inv": scales}, {})["q_proj.weight"].block
    (128, 128)

    Args:
        folder: of the model, for messages.
        headers: of its files.
        options: `quantization_config`; a `weight_block_size` of null means one scale per matrix.

    Raises:
        MoqaError: naming a tensor whose scales are missing or do not fit it.
    """
    size = _block_size(folder, options)
    found: dict[str, Blocks] = {}
    for name, entry in headers.items():
        if entry["dtype"] not in _WEIGHTS:
            continue
        names = list(_scale_names(name))
        scale = next((other for other in names if other in headers), None)
        if scale is None:
            raise MoqaError(f"{folder}: {name} is {entry['dtype']} without scales", f"{names[0]} must be stored too")
        shape = tuple(entry["shape"])
        if len(shape) < 2:
            raise MoqaError(f"{folder}: {name} is {entry['dtype']} {list(shape)}", "FP8 tensors are matrices")
        if entry["dtype"] == _PACKED:
            shape = (*shape[:-1], 2 * shape[-1])
        block = _PACKED_BLOCK if entry["dtype"] == _PACKED else size or (max(1, shape[-2]), max(1, shape[-1]))
        _check_scales(folder, name, shape, block, scale, headers[scale])
        unused = [other for other in (f"{name.removesuffix('weight')}activation_scale",) if other in headers]
        found[name] = Fp8((name, scale, *unused), shape, block)
    return found


def _block_size(folder: Path, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None if a whole matrix has one scale."""
    size = options.get("weight_block_size", _USUAL_BLOCK)
    if size is None:
        return None
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise MoqaError(f"{folder} has a weight_block_size of {size}", "give rows and columns, e.g. [128, 128]")
    return size[0], size[1]


def _scale_names(name: str) -> Iterator[str]:
    """Names under which a tensor's scales may be stored."""
    yield f"{name}_scale_inv"
    if name.endswith(".weight"):
        yield f"{name.removesuffix('weight')}scale"


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> list[int]:
    """Shape that the scales should have."""
    return [*shape[:-2], *(-(-side // length) for side, length in zip(shape[-2:], block, strict=True))]


def _check_scales(
    folder: Path, name: str, shape: tuple[int, ...], block: tuple[int, int], scale: str, entry: Mapping[str, Any]
) -> None:
    if entry["dtype"] not in _SCALES:
        raise MoqaError(f"{folder}: {scale} is {entry['dtype']}", f"scales are one of {', '.join(_SCALES)}")
    found, wanted = [*entry["shape"]], _grid(shape, block)
    # a single scale may be stored as a scalar
    if found != wanted and (math.prod(found), math.prod(wanted)) != (1, 1):
        raise MoqaError(
            f"{folder}: {scale} is {found}", f"{name} {list(shape)} in blocks of {block[0]}x{block[1]} needs {wanted}"
        )
