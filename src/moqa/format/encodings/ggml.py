"""The block types of ggml, the library below llama.cpp: how its files store weights. Only exports have them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.format.encodings.encoding import Parameters, TensorSpec


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


# strategies that do not mix encodings take the first of a width: K-quants, which every backend runs fast.
# https://github.com/ggml-org/llama.cpp, ggml/include/ggml.h and ggml/src/ggml-common.h
# Name, number, width, weights and bytes of a block.
_ALL = (
    ("q2_k", 10, 2, 256, 84), ("q3_k", 11, 3, 256, 110), ("q4_k", 12, 4, 256, 144), ("q5_k", 13, 5, 256, 176),
    ("q6_k", 14, 6, 256, 210), ("q8_0", 8, 8, 32, 34), ("iq1_s", 19, 1, 256, 50), ("iq1_m", 29, 1, 256, 56),
    ("iq2_xxs", 16, 2, 256, 66), ("iq2_xs", 17, 2, 256, 74), ("iq2_s", 22, 2, 256, 82), ("iq3_xxs", 18, 3, 256, 98),
    ("iq3_s", 21, 3, 256, 110), ("iq4_xs", 23, 4, 256, 136), ("iq4_nl", 20, 4, 32, 18), ("q5_1", 7, 5, 32, 24),
)  # fmt: skip
GGML_TYPES = {name: GgmlBlocks(name, number, (width,), *block) for name, number, width, *block in _ALL}
