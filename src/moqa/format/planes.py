"""Packing: matrices of b-bit integers as planes of 4, 2 and 1 bits, in the order in which kernels read them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.tiles import BLOCK, PLANES, TILE


def pack(integers: Tensor, width: int) -> list[Tensor]:
    """Split a matrix of `width`-bit integers into planes, the most significant first, and pack each plane in tiles.

    >>> [plane.shape for plane in pack(torch.zeros(256, 128, dtype=torch.uint8), 3)]
    [torch.Size([16, 4, 128]), torch.Size([16, 4, 64])]

    A tile holds 16 rows and 32 inputs. Four neighbouring inputs of all its rows make a vector of 64 bytes: byte
    4 r + i is input i of row r, the order that a product of bytes in 32-bit lanes takes. A plane of p bits stores the
    eight vectors of a tile in p vectors: bit field k of vector j holds vector (8 / p) j + k. So one load, a shift and a
    mask unpack each of them, whatever p is. Matrices are padded with zeros to whole tiles.

    Args:
        integers: [..., out, in] uint8, each below 2^width.
        width: 1 to 8.

    Returns:
        One [..., tiles, blocks, 64 p] uint8 tensor per plane of `PLANES[width]`.
    """
    out, features = integers.shape[-2:]
    whole = pad(integers, (0, -features % BLOCK, 0, -out % TILE))
    tiles = whole.unflatten(-1, (-1, 8, 4)).unflatten(-4, (-1, TILE)).movedim(-4, -2)
    planes, shift = [], width
    for bits in PLANES[width]:
        shift -= bits
        fields = (tiles.flatten(-2) >> shift & (2**bits - 1)).unflatten(-2, (bits, 8 // bits))
        planes.append((fields << _shifts(bits, fields.device)).sum(-2, dtype=torch.uint8).flatten(-2))
    return planes


def unpack(planes: list[Tensor], width: int, shape: tuple[int, int]) -> Tensor:
    """Integers of packed planes: the inverse of `pack`.

    >>> integers = torch.randint(0, 8, (24, 100), dtype=torch.uint8)
    >>> torch.equal(unpack(pack(integers, 3), 3, (24, 100)), integers)
    True

    Args:
        planes: one [..., tiles, blocks, 64 p] uint8 tensor per plane; with fewer than `PLANES[width]` has, the missing
            low bits are zero.
        width: 1 to 8.
        shape: (out, in) of the matrix.

    Returns:
        [..., out, in] uint8.
    """
    total: Tensor | None = None
    shift = width
    for plane, bits in zip(planes, PLANES[width], strict=False):
        shift -= bits
        vectors = plane.unflatten(-1, (bits, 1, 64))
        part = (((vectors >> _shifts(bits, plane.device)) & (2**bits - 1)) << shift).flatten(-3, -2)
        total = part if total is None else total | part
    assert total is not None
    tiles = total.unflatten(-1, (TILE, 4)).movedim(-2, -4)
    return tiles.flatten(-3).flatten(-3, -2)[..., : shape[0], : shape[1]]


def tile_rows(values: Tensor) -> Tensor:
    """One value per row and group in the order of tiles.

    >>> tile_rows(torch.ones(24, 3)).shape
    torch.Size([2, 3, 16])

    Args:
        values: [..., out, groups].

    Returns:
        [..., tiles, groups, 16], zero where a tile has no row.
    """
    lacking = -values.shape[-2] % TILE
    values = pad(values, (0, 0, 0, lacking)) if lacking else values
    return values.unflatten(-2, (-1, TILE)).mT.contiguous()


def untile_rows(tiled: Tensor, out: int) -> Tensor:
    """The inverse of `tile_rows` for a matrix of `out` rows."""
    return tiled.mT.flatten(-3, -2)[..., :out, :]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return (torch.arange(8 // bits, dtype=torch.uint8, device=device) * bits)[:, None]
