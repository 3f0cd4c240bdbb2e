"""MXFP4 as in gpt-oss: experts as 4-bit floats, every 32 of which share a power of two as their scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.originals.blocks import Blocks, Part, as_float, bands, unpack_e2m1

_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4:
    """A stack of experts' matrices, [experts, in, out], stored as [experts, out, in].

    >>> Mxfp4("mlp.experts.down_proj", (32, 2880, 2880)).parts
    ('mlp.experts.down_proj_blocks', 'mlp.experts.down_proj_scales')

    Every value is exact in bfloat16.

    Attributes:
        name: of the plain tensor.
        shape: of the plain tensor.
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk of [experts, out, groups, bytes] and [experts, out, groups]."""
        return self.name + _BLOCKS, self.name + _SCALES

    def read(self, part: Part) -> Tensor:
        """The plain tensor, bfloat16."""
        blocks, scales = (part(name) for name in self.parts)
        experts, features, rows = self.shape
        whole = torch.empty(self.shape, dtype=torch.bfloat16)
        for expert in range(experts):
            for some in bands(rows, features):
                values = unpack_e2m1(blocks[expert, some]) * as_float(scales[expert, some])[..., None]
                whole[expert, :, some] = values.flatten(1).T
        return whole


def find_mxfp4(folder: Path, headers: Mapping[str, dict], options: Mapping[str, Any]) -> dict[str, Blocks]:  # noqa: ARG001  (all formats get their options)
    """Tensors of a model that are stored as MXFP4, by the names of the plain tensors.

    >>> blocks, scales = {"dtype": "U8", "shape": [32, 2880, 90, 16]}, {"dtype": "U8", "shape": [32, 2880, 90]}
    >>> find_mxfp4(Path("model"), {"down_proj_blocks": blocks, "down_proj_scales": scales}, {})["down_proj"].shape
    (32, 2880, 2880)

    Args:
        folder: of the model, for messages.
        headers: of its files.
        options: `quantization_config`.

    Raises:
        MoqaError: naming a tensor whose blocks or scales are missing or do not fit each other.
    """
    names = {name.removesuffix(end) for name in headers for end in (_BLOCKS, _SCALES) if name.endswith(end)}
    found: dict[str, Blocks] = {}
    for name in sorted(names):
        for end, dtypes in ((_BLOCKS, ("U8",)), (_SCALES, ("U8", "F8_E8M0"))):
            if name + end not in headers:
                raise MoqaError(f"{folder} lacks {name + end}", "blocks and scales belong together")
            if (dtype := headers[name + end]["dtype"]) not in dtypes:
                raise MoqaError(f"{folder}: {name + end} is {dtype}", f"MXFP4 needs {' or '.join(dtypes)}")
        blocks, scales = ([*headers[name + end]["shape"]] for end in (_BLOCKS, _SCALES))
        if len(blocks) != 4 or blocks[:-1] != scales:
            raise MoqaError(f"{folder}: {name + _SCALES} is {scales}", f"{name + _BLOCKS} {blocks} needs {blocks[:3]}")
        experts, rows, groups, size = blocks
        found[name] = Mxfp4(name, (experts, groups * size * 2, rows))
    return found
