"""The block types of ggml, the library below llama.cpp."""

from typing import NamedTuple


class GgmlType(NamedTuple):
    """A type: every `weights` of a row are a block of so many bytes, with its scales in it.

    Attributes:
        number: by which files refer to it.
        width: nominal bits of a weight.
        weights: of one block; rows must be a multiple of it.
        bytes: of one block.
    """

    number: int
    width: int
    weights: int
    bytes: int


# strategies that do not mix encodings take the first of a width: K-quants, which every backend runs fast.
# https://github.com/ggml-org/llama.cpp, ggml/include/ggml.h and ggml/src/ggml-common.h
# Name, number, width, weights and bytes of a block.
_ALL = (
    ("q2_k", 10, 2, 256, 84), ("q3_k", 11, 3, 256, 110), ("q4_k", 12, 4, 256, 144), ("q5_k", 13, 5, 256, 176),
    ("q6_k", 14, 6, 256, 210), ("q8_0", 8, 8, 32, 34), ("iq1_s", 19, 1, 256, 50), ("iq1_m", 29, 1, 256, 56),
    ("iq2_xxs", 16, 2, 256, 66), ("iq2_xs", 17, 2, 256, 74), ("iq2_s", 22, 2, 256, 82), ("iq3_xxs", 18, 3, 256, 98),
    ("iq3_s", 21, 3, 256, 110), ("iq4_xs", 23, 4, 256, 136), ("iq4_nl", 20, 4, 32, 18), ("q5_1", 7, 5, 32, 24),
)  # fmt: skip
GGML_BLOCKS = {name: GgmlType(*numbers) for name, *numbers in _ALL}
