"""Integers in words of 32 bits, as GPTQ, AWQ and compressed-tensors store weights: the lowest bits first."""

import torch
from torch import Tensor

_WORD = 32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Integers of [..., words] int32, which follow each other without a gap.

    >>> unpack_words(torch.tensor([0x21], dtype=torch.int32), 4)[:3]
    tensor([1, 2, 0])

    Args:
        words: [..., n] int32.
        bits: of each integer, 1 to 8.

    Returns:
        [..., n * 32 // bits] int64.
    """
    *shape, count = words.shape
    unsigned = words.long() & 0xFFFFFFFF
    if _WORD % bits == 0:
        return ((unsigned[..., None] >> torch.arange(0, _WORD, bits)) & (2**bits - 1)).reshape(*shape, -1)
    # an integer may begin in one word and end in the next
    following = torch.cat([unsigned[..., 1:], unsigned.new_zeros(*shape, 1)], -1)
    begins = torch.arange(0, count * _WORD // bits * bits, bits)
    word, place = begins // _WORD, begins % _WORD
    # without the top bit, which a shift could not hold, there is still room for 8 bits of the next word
    low = unsigned[..., word] >> place
    high = (following[..., word] << (_WORD - place).clamp_max(_WORD)) & 0xFF_FFFF_FFFF
    return (low | high) & (2**bits - 1)
