"""Codes and levels: the values of weights in the encodings `table` and `trellis`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.grid import from_groups, to_groups
from moqa.format.planes import tile_rows
from moqa.format.tiles import TILE

# Largest factor: factors are stored in 6 bits.
FACTORS = 63
# Levels of weights with a normal distribution, in steps of which the largest has 63: pairs of products of a level with
# an activation then fit in 16 bits. Levels are symmetric; these are the upper halves.
_TABLE = {1: (63,), 2: (19, 63), 3: (7, 22, 39, 63), 4: (3, 9, 15, 22, 29, 37, 48, 63)}
_TRELLIS = {1: (19, 63), 2: (6, 21, 36, 63), 3: (3, 8, 14, 20, 27, 35, 46, 63)}
UPPER_LEVELS = {"table": _TABLE, "trellis": _TRELLIS}
# Steps in one standard deviation of such weights.
DEVIATION = {
    "table": {1: 79.1, 2: 41.7, 3: 29.3, 4: 23.1},
    "trellis": {1: 52.1, 2: 33.6, 3: 25.1},
}


def levels(encoding: str, width: int) -> tuple[int, ...]:
    """Levels of an encoding at a width, ascending.

    >>> levels("table", 2), levels("trellis", 1)
    ((-63, -19, 19, 63), (-63, -19, 19, 63))
    """
    upper = UPPER_LEVELS[encoding][width]
    return (*(-level for level in reversed(upper)), *upper)


@dataclass(frozen=True)
class LevelGrid:
    """Scales and factors of a stack of coded matrices; a weight is `scale * factor * level`.

    In the trellis the level depends on codes of other rows: the lowest bit of a code is its coded bit, and the level's
    index is `4 free + 2 (c ^ c2) + c1`, with the code's other bits (free), its coded bit c, and the coded bits c1 and
    c2 of the rows 16 and 32 above. Above the first rows of a matrix are its last ones.

    Attributes:
        encoding: `table` or `trellis`.
        scale: [..., out] in the scheme's scale dtype.
        factor: [..., out, groups] uint8, 0 to 63.
        group_size: weights along the input that share a factor.
        width: [..., out] bits of each row's codes, so that one stack can mix widths.
        parts: rows of each matrix, where several are stacked along `out`.
        apart: rows from one to the next in a sequence of the trellis: 16 in whole matrices.
    """

    encoding: str
    scale: Tensor
    factor: Tensor
    group_size: int
    width: Tensor
    parts: tuple[int, ...]
    apart: int = TILE

    def scales(self) -> Tensor:
        """[..., out, groups] value of one step, float32."""
        return self.scale.float()[..., None] * self.factor.float()

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of [..., out, in] codes, float32."""
        return self.scaled(self.levels_of(codes))

    def scaled(self, levels: Tensor) -> Tensor:
        """Weights of [..., out, in] levels, float32; differentiable by scales and factors."""
        return from_groups(to_groups(levels, self.group_size) * self.scales()[..., None], levels.shape[-1])

    def levels_of(self, codes: Tensor) -> Tensor:
        """[..., out, in] levels of codes, float32."""
        index = codes.long()
        if self.encoding == "trellis":
            index = torch.cat([level_index(part, self.apart) for part in index.split(self.parts, -2)], -2)
        known = UPPER_LEVELS[self.encoding]
        table = torch.zeros(max(known) + 1, 2 * len(known[max(known)]))
        for width in known:
            found = levels(self.encoding, width)
            table[width, : len(found)] = torch.tensor(found, dtype=torch.float32)
        return table.to(codes.device)[self.width[..., None].long().expand(index.shape), index]

    def stored(self, planes: Sequence[Tensor]) -> dict[str, Tensor]:
        """One matrix by suffix, see `Scheme.tensors`, from the planes of its codes."""
        tensors = {f"p{index}": plane for index, plane in enumerate(planes)}
        scale = tile_rows(self.scale[..., None])[..., 0, :].contiguous()
        return tensors | {"scale": scale, "factor": pack_factors(self.factor)}

    def __getitem__(self, index: Any) -> "LevelGrid":
        found = replace(self, scale=self.scale[index], factor=self.factor[index], width=self.width[index])
        rows = found.scale.shape[-1]
        return found if rows == sum(self.parts) else replace(found, parts=(rows,))


def level_index(codes: Tensor, apart: int = TILE) -> Tensor:
    """Index of the level of every code of a trellis, see `LevelGrid`.

    >>> level_index(torch.tensor([[1], [0]])).T
    tensor([[1, 0]])

    Args:
        codes: [..., out, in] int64.
        apart: see `LevelGrid`.
    """
    out = codes.shape[-2]
    whole = pad(codes, (0, 0, 0, -out % apart)).unflatten(-2, (-1, apart))
    coded = whole & 1
    newest, older = coded.roll(1, -3), coded.roll(2, -3)
    return ((whole >> 1) * 4 + (coded ^ older) * 2 + newest).flatten(-3, -2)[..., :out, :]


def pack_factors(factors: Tensor) -> Tensor:
    """Factors of 6 bits in the order of tiles: eight bytes with the low four bits of 16 rows, four with the high two.

    >>> pack_factors(torch.full((24, 3), 63, dtype=torch.uint8)).shape
    torch.Size([2, 3, 12])

    Args:
        factors: [..., out, groups] uint8.

    Returns:
        [..., tiles, groups, 12] uint8: byte j has rows j and j + 8, then byte 8 + j has rows j, j + 4, j + 8, j + 12.
    """
    tiled = tile_rows(factors)
    low = (tiled & 15).unflatten(-1, (2, 8))
    high = (tiled >> 4).unflatten(-1, (4, 4))
    return torch.cat([_joined(low, 4), _joined(high, 2)], -1)


def unpack_factors(packed: Tensor, out: int) -> Tensor:
    """The inverse of `pack_factors` for a matrix of `out` rows: [..., out, groups] uint8."""
    low = _fields(packed[..., :8], 4)
    high = _fields(packed[..., 8:], 2)
    return (low | high << 4).mT.flatten(-3, -2)[..., :out, :]


def _joined(fields: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)[:, None]
    return (fields << shifts).sum(-2, dtype=torch.uint8)


def _fields(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return ((packed[..., None, :] >> shifts) & (2**bits - 1)).flatten(-2)
