"""Schemes: how one unit's weights are stored, and exactly how many bytes that takes."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator

# A tile of 16 rows by 32 inputs is what a kernel takes at once: a plane of p bits stores it in p vectors of 64 bytes.
TILE = 16
BLOCK = 32
KEEP_WIDTH = 16
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
# products of 8 bits over a larger group would not fit in 32
LARGEST_GROUP = 2**16
# Most significant plane first, so that dropping planes from the end leaves a coarser version of the same weights.
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (4, 4),
}


class Scheme(BaseModel, frozen=True):
    """How one unit's weights are stored.

    >>> Scheme(width=3).stored_bytes((256, 256))
    30720

    Width 16 keeps the matrix as 16-bit floating point; the other fields then do not matter.
    """

    width: int = Field(ge=1, le=16, description="bits of each stored integer; 16 is not quantized: 16-bit floats")
    group_size: int = Field(
        default=64, ge=BLOCK, le=LARGEST_GROUP, multiple_of=BLOCK,
        description="weights along the input dimension that share a scale",
    )  # fmt: skip
    symmetric: bool = Field(default=False, description="no zero-point: the grid is centred on zero")
    scale_dtype: Literal["bfloat16", "float16"] = Field(default="bfloat16", description="dtype of the stored scales")

    @model_validator(mode="after")
    def _check(self) -> "Scheme":
        if self.width not in (*WIDTHS, KEEP_WIDTH):
            raise ValueError(f"width {self.width} is not stored; widths are 1 to 8, and 16 for no quantization")
        if self.symmetric and self.width == 1:
            raise ValueError("width 1 cannot be symmetric: one of its two levels would be zero")
        return self

    @property
    def keeps(self) -> bool:
        """Whether the unit stays in floating point."""
        return self.width == KEEP_WIDTH

    @property
    def levels(self) -> int:
        """Number of values that a stored integer can take."""
        return 2**self.width

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor that stores a unit of [out, in] weights, by suffix.

        >>> Scheme(width=3).tensors((256, 100))["p0"]
        (torch.uint8, (16, 4, 128))
        """
        out, features = shape
        if self.keeps:
            return {"weight": (torch.bfloat16, shape)}
        tiles, blocks, groups = -(-out // TILE), -(-features // BLOCK), -(-features // self.group_size)
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"p{index}": (torch.uint8, (tiles, blocks, TILE * BLOCK * bits // 8))
            for index, bits in enumerate(PLANES[self.width])
        }
        stored["scale"] = (getattr(torch, self.scale_dtype), (tiles, groups, TILE))
        if not self.symmetric:
            stored["zero"] = (torch.uint8, (tiles, groups, TILE))
        return stored

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a unit of [out, in] weights with its scales and zero-points."""
        return sum(dtype.itemsize * math.prod(stored) for dtype, stored in self.tensors(shape).values())
