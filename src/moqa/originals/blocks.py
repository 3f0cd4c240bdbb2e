"""Shared by block formats: 4-bit numbers, scales that are powers of two, and reading some rows at a time."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# numbers that are converted at a time: a float32 copy of a whole matrix would be larger than the matrix
_CHUNK = 2**20
# values of 4-bit floats (e2m1); the upper half of the codes is negative
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# returns the tensor on disk with a name; it is read when it is indexed
Part = Callable[[str], Any]


class Blocks(Protocol):
    """A plain tensor that is stored as blocks."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk of the tensors that it is stored as."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor."""

    def read(self, part: Part) -> Tensor:
        """The plain tensor, bfloat16."""


def bands(rows: int, columns: int) -> Iterator[slice]:
    """Slices of a matrix's rows that are converted at a time.

    >>> list(bands(5, 2**19))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack 4-bit floats, two in a byte, the one in the lower half first.

    >>> unpack_e2m1(torch.tensor([[0x2F]], dtype=torch.uint8))
    tensor([[-6.,  1.]])

    Args:
        packed: [..., n] uint8 or int8.

    Returns:
        [..., 2n] float32.

    OCP Microscaling Formats 1.0, section 5.3.3.
    """
    codes = packed.contiguous().view(torch.uint8)
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return values.index_select(0, halves.int().flatten()).view(halves.shape)


def as_float(scales: Tensor) -> Tensor:
    """Scales as float32; a byte is an exponent (e8m0), where 255 means NaN.

    >>> as_float(torch.tensor([126, 127, 130, 255], dtype=torch.uint8))
    tensor([0.5000, 1.0000, 8.0000,    nan])

    OCP Microscaling Formats 1.0, section 5.4.1.
    """
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
