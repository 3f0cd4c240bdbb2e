"""The block types of ggml, the library below llama.cpp: how its files store weights. Only exports have them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.format.encodings.encoding import Parameters, TensorSpec
from moqa.gguf.types import GGML_BLOCKS


@dataclass
class GgmlBlocks:
    """A type of ggml: every `weights` of a row are a block of so many bytes, with its scales in it.

    >>> GGML_TYPES["q4_k"].tensors(Parameters(width=4), (256, 512))
    {'blocks': (torch.uint8, (256, 288))}

    Attributes:
        name: as llama.cpp writes it.
        number: by which files refer to it.
        widths: one: nominal bits of a weight.
        weights: of one block; rows must be a multiple of it.
        bytes: of one block.
    """

    name: str
    number: int
    widths: tuple[int, ...]
    weights: int
    bytes: int

    @property
    def width(self) -> int:
        """Nominal bits of a weight."""
        return self.widths[0]

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:  # noqa: ARG002
        """See `Encoding`; a row that is no multiple of a block is counted up to one."""
        return {"blocks": (torch.uint8, (shape[0], -(-shape[1] // self.weights) * self.bytes))}

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """See `Encoding`; by ggml's own code."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        weights = dequantize(tensors["blocks"].numpy(), GGMLQuantizationType(self.number))
        return torch.from_numpy(weights).reshape(shape)


GGML_TYPES = {
    name: GgmlBlocks(name, kind.number, (kind.width,), kind.weights, kind.bytes) for name, kind in GGML_BLOCKS.items()
}
