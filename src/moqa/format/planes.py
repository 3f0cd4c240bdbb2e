"""Packing: b-bit integers as planes of 4, 2 and 1 bits, the most significant first."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.scheme import BLOCK, PLANES


def pack(integers: Tensor, width: int) -> list[Tensor]:
    """Split integers of `width` bits in planes and pack each plane in bytes.

    >>> [plane.shape for plane in pack(torch.zeros(256, 128, dtype=torch.uint8), 3)]
    [torch.Size([256, 32]), torch.Size([256, 16])]

    A plane of p bits stores 64 consecutive weights of a row in 8 p bytes: bit field k of byte j holds weight
    8 p k + j. So one load, a shift per lane and a mask give the 64 weights in order, whatever p is. Rows are filled up
    with zeros to a multiple of 64.

    Args:
        integers: [..., in] uint8, each below 2^width.
        width: 1 to 8.

    Returns:
        One [..., bytes] uint8 tensor per plane of `PLANES[width]`.
    """
    features = integers.shape[-1]
    blocks = -(-features // BLOCK)
    padded = pad(integers, (0, blocks * BLOCK - features)).unflatten(-1, (blocks, BLOCK))
    planes, shift = [], width
    for bits in PLANES[width]:
        shift -= bits
        field = (padded >> shift) & (2**bits - 1)
        lanes = field.unflatten(-1, (8 // bits, 8 * bits))
        shifts = (torch.arange(8 // bits, dtype=torch.uint8) * bits)[:, None]
        planes.append((lanes << shifts).sum(-2, dtype=torch.uint8).flatten(-2))
    return planes


def unpack(planes: list[Tensor], width: int, features: int) -> Tensor:
    """Integers of packed planes: the inverse of `pack`.

    >>> integers = torch.randint(0, 8, (4, 100), dtype=torch.uint8)
    >>> torch.equal(unpack(pack(integers, 3), 3, 100), integers)
    True

    Args:
        planes: one [..., bytes] uint8 tensor per plane; fewer than `PLANES[width]` has gives a coarser version whose
            missing low bits are zero.
        width: 1 to 8.
        features: length of a row.

    Returns:
        [..., features] uint8.
    """
    total: Tensor | None = None
    shift = width
    for plane, bits in zip(planes, PLANES[width], strict=False):
        shift -= bits
        lanes = plane.unflatten(-1, (-1, 1, 8 * bits))
        shifts = (torch.arange(8 // bits, dtype=torch.uint8) * bits)[:, None]
        part = (((lanes >> shifts) & (2**bits - 1)) << shift).flatten(-3)
        total = part if total is None else total | part
    assert total is not None
    return total[..., :features]
