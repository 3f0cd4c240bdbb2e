"""What an encoding defines: which tensors store a unit, and which weights they represent."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class Parameters(Protocol):
    """The fields of `moqa.format.scheme.Scheme` that encodings use."""

    @property
    def width(self) -> int:
        """See `Scheme`."""

    @property
    def group_size(self) -> int:
        """See `Scheme`."""

    @property
    def symmetric(self) -> bool:
        """See `Scheme`."""

    @property
    def scale_dtype(self) -> Literal["bfloat16", "float16"]:
        """See `Scheme`."""


class Encoding(Protocol):
    """One way to store a unit's weights.

    Attributes:
        name: by which schemes refer to it.
    """

    name: str

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that stores [out, in] weights, by suffix: a plan's bytes are their sum."""

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
        """[out, in] weights that stored tensors represent, float32: every kernel must agree with them."""
