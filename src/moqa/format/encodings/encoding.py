"""What an encoding defines: which tensors store a unit, and which weights they represent."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from moqa.format.tiles import BLOCK, LARGEST_GROUP

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class Parameters(BaseModel, frozen=True):
    """The fields of `moqa.format.scheme.Scheme` that encodings use."""

    width: int = Field(ge=1, le=16, description="bits of each stored integer; 16 means not quantized: 16-bit floats")
    group_size: int = Field(
        default=64, ge=BLOCK, le=LARGEST_GROUP, multiple_of=BLOCK,
        description="weights along the input dimension that share a scale",
    )  # fmt: skip
    symmetric: bool = Field(default=False, description="no zero-point: the grid is centred on zero")
    scale_dtype: Literal["bfloat16", "float16"] = Field(default="bfloat16", description="dtype of the stored scales")


class Encoding(Protocol):
    """One way to store a unit's weights.

    Attributes:
        name: by which schemes refer to it.
        widths: that it has.
    """

    name: str
    widths: tuple[int, ...]

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that stores [out, in] weights, by suffix: a plan's bytes are their sum."""

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
        """[out, in] weights that stored tensors represent, float32: every kernel must agree with them."""
