"""The part of a unit that one of several processes computes with: some of its rows, or some of its inputs.

Tiles are cut out as they are stored. Levels of the trellis also depend on the codes of the two tiles above, and above
the first tile of a matrix is its last one: so a part with rows of a trellis ends with the two tiles that were above its
first, as rows with a scale of zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.errors import MoqaError
from moqa.format.manifest import StoredUnit
from moqa.format.scheme import Scheme
from moqa.format.tiles import BLOCK, TILE

# rows that a part of a trellis has more, and inputs of what they are multiplied with afterwards
HALO = 2 * TILE
_MOST = 64  # processes that a message speaks of


@dataclass(frozen=True)
class UnitPart:
    """Which rows and inputs of an [out, in] unit a process has.

    >>> part = UnitPart(Scheme(width=2, encoding="trellis"), (64, 128), count=2, index=1, by="rows", silent_rows=32)
    >>> part.shape, part.rows
    ((64, 128), (32, 64))

    Attributes:
        scheme: of the unit.
        whole: (out, in) of the unit.
        count: number of parts.
        index: of this one.
        by: what is divided: `rows` or `inputs`.
        silent_rows: rows at the end whose products are zero: `HALO` for a trellis, and for others that go with it.
        silent_inputs: inputs at the end that are zero.
    """

    scheme: Scheme
    whole: tuple[int, int]
    count: int = 1
    index: int = 0
    by: str = "rows"
    silent_rows: int = 0
    silent_inputs: int = 0

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the one after the last, without silent ones."""
        return self._range(self.whole[0], self.by == "rows")

    @property
    def inputs(self) -> tuple[int, int]:
        """First input, and the one after the last, without silent ones."""
        return self._range(self.whole[1], self.by == "inputs")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) with silent ones."""
        (top, bottom), (left, right) = self.rows, self.inputs
        return bottom - top + self.silent_rows, right - left + self.silent_inputs

    def cut(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part's tensors, from those of the unit, by suffix (`Scheme.tensors`)."""
        if not self.silent_rows + self.silent_inputs and self.count == 1:
            return dict(stored)
        return {suffix: self._cut(suffix, tensor).contiguous() for suffix, tensor in stored.items()}

    def _range(self, size: int, divided: bool) -> tuple[int, int]:
        each = size // self.count
        return (self.index * each, (self.index + 1) * each) if divided else (0, size)

    def _cut(self, suffix: str, tensor: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.rows, self.inputs
        if suffix == "weight":
            return pad(tensor[top:bottom, left:right], (0, self.silent_inputs, 0, self.silent_rows))
        tiles = torch.arange(top // TILE, -(-bottom // TILE))
        halo = torch.arange(top // TILE - self.silent_rows // TILE, top // TILE) % len(tensor)
        cut = tensor[torch.cat([tiles, halo])]
        if suffix == "scale":
            cut[len(tiles) :] = 0
        if suffix == "scale" and self.scheme.is_coded:
            return cut  # of whole rows
        # planes are in blocks; scales, zero-points and factors in groups, of which the last may be shorter
        size = BLOCK if suffix.startswith("p") else self.scheme.group_size
        cut = cut[:, left // size : -(-right // size)]
        return pad(cut, (0, 0, 0, -(-self.silent_inputs // size)))


def divides(scheme: Scheme, shape: tuple[int, int], count: int, by: str) -> bool:
    """Whether a unit can be divided into so many equal parts of whole tiles and groups.

    >>> divides(Scheme(width=4, group_size=64), (768, 256), 8, "rows")
    True
    >>> divides(Scheme(width=4, group_size=64), (256, 768), 8, "inputs")
    False
    """
    size = shape[by == "inputs"]
    step = TILE if by == "rows" else BLOCK if scheme.is_unquantized else math.lcm(BLOCK, scheme.group_size)
    return count == 1 or size % (count * step) == 0


def count_of(name: str, unit: StoredUnit, size: tuple[int, int], by: str) -> int:
    """Among how many processes vLLM divides a unit.

    Args:
        name: of the unit.
        unit: as it is stored.
        size: (out, in) that vLLM expects of each process.
        by: what it divides.

    Raises:
        MoqaError: if the unit cannot be divided so, naming the numbers of processes that divide it, or is another.
    """
    scheme, shape, side = unit.scheme, unit.shape, int(by == "inputs")
    count = max(1, round(shape[side] / size[side]))
    if shape[1 - side] != size[1 - side] or (count == 1 and shape != size):
        raise MoqaError(f"vLLM's layer needs {name} of {size}", f"the checkpoint has {shape}")
    if not divides(scheme, shape, count, by) or shape[side] != count * size[side]:
        able = [n for n in range(1, _MOST + 1) if divides(scheme, shape, n, by)]
        groups = f" in groups of {scheme.group_size}" if by == "inputs" and not scheme.is_unquantized else ""
        raise MoqaError(
            f"--tensor-parallel-size {count} does not divide the {shape[side]} {by} of {name}{groups}",
            f"what does: {', '.join(map(str, able))}",
        )
    return count
