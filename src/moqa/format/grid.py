"""The integer grid: which values the weights of a group can take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.planes import tile_rows

# Zero-points are stored in a byte for every width: 1/255 of the grid's span per step.
ZERO_STEPS = 255


@dataclass(frozen=True)
class Grid:
    """Scales and zero-points of a stack of matrices; a weight is `scale * (integer - offset)`.

    Attributes:
        scale: [..., out, groups] in the scheme's scale dtype.
        zero: [..., out, groups] uint8, the offset in steps of (levels - 1) / 255; None if symmetric.
        group_size: weights along the input that share a scale.
        top: largest integer, broadcastable to scale, so that one stack can mix widths.
    """

    scale: Tensor
    zero: Tensor | None
    group_size: int
    top: Tensor

    def offset(self) -> Tensor:
        """[..., out, groups] integer-valued or fractional position of weight zero on the grid, float32."""
        if self.zero is None:
            return ((self.top + 1) / 2).expand_as(self.scale).float()
        return self.zero.float() * (self.top / ZERO_STEPS)

    def encode(self, weights: Tensor) -> Tensor:
        """Nearest grid integers of [..., out, in] weights, uint8."""
        groups = to_groups(weights, self.group_size)
        integers = nearest(groups, self.scale.float()[..., None], self.offset()[..., None], self.top[..., None])
        return from_groups(integers, weights.shape[-1]).to(torch.uint8)

    def decode(self, integers: Tensor) -> Tensor:
        """Weights of [..., out, in] grid integers, float32."""
        values = to_groups(integers.float(), self.group_size)
        values.sub_(self.offset()[..., None]).mul_(self.scale.float()[..., None])
        return from_groups(values, integers.shape[-1])

    def scales(self) -> Tensor:
        """[..., out, groups] value of one step, float32."""
        return self.scale.float()

    def stored(self, planes: Sequence[Tensor]) -> dict[str, Tensor]:
        """One matrix by suffix, see `Scheme.tensors`, from the planes of its integers."""
        tensors = {f"p{index}": plane for index, plane in enumerate(planes)} | {"scale": tile_rows(self.scale)}
        return tensors if self.zero is None else tensors | {"zero": tile_rows(self.zero)}

    def __getitem__(self, index: object) -> "Grid":
        zero = None if self.zero is None else self.zero[index]  # type: ignore[index]
        return Grid(self.scale[index], zero, self.group_size, self.top[index])  # type: ignore[index]


@dataclass(frozen=True)
class Neighbours:
    """Of each weight the two integers of a grid next to a value: one bit says which of them.

    It is a grid of its own, with two integers, and an offset for each weight: methods round on it as on any other.

    Attributes:
        grid: of the weights.
        lower: [..., out, in] the lower of the two integers, uint8.
    """

    grid: Grid
    lower: Tensor

    @classmethod
    def of(cls, grid: Grid, values: Tensor) -> "Neighbours":
        """Next to [..., out, in] float32 values.

        A file that stores the bits relies on every step: in double precision, each operation rounded by itself.
        """
        scale = grid.scale.double()[..., None]
        position = to_groups(values.double(), grid.group_size) / scale + grid.offset().double()[..., None]
        # all weights of a group without a scale are zero
        lower = torch.where(scale > 0, position, 0.0).floor_().clamp_(min=0).minimum(grid.top.double()[..., None] - 1)
        return cls(grid, from_groups(lower, values.shape[-1]).to(torch.uint8))

    group_size = 1

    @property
    def top(self) -> Tensor:
        """Largest integer: 1."""
        return torch.ones_like(self.grid.top)

    def scales(self) -> Tensor:
        """[..., out, in] value of one step, float32."""
        return self._each(self.grid.scales())

    def offset(self) -> Tensor:
        """[..., out, in] position of weight zero, counted from the lower integer, float32."""
        return self._each(self.grid.offset()).sub_(self.lower)

    def decode(self, bits: Tensor) -> Tensor:
        """Weights of [..., out, in] bits, float32."""
        return self.grid.decode(self.lower + bits)

    def nearest_to(self, integers: Tensor) -> Tensor:
        """Of the two integers of each weight the one that is nearer to [..., out, in] others, uint8."""
        return integers.clamp(min=self.lower, max=self.lower + 1)

    def _each(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.grid.group_size, -1)[..., : self.lower.shape[-1]]

    def __getitem__(self, index: object) -> "Neighbours":
        return Neighbours(self.grid[index], self.lower[index])  # type: ignore[index]


def to_groups(weights: Tensor, group_size: int) -> Tensor:
    """[..., in] -> [..., groups, group_size], the last group padded with zeros."""
    features = weights.shape[-1]
    groups = -(-features // group_size)
    if groups * group_size != features:
        weights = pad(weights, (0, groups * group_size - features))
    return weights.unflatten(-1, (groups, group_size))


def from_groups(groups: Tensor, features: int) -> Tensor:
    """[..., groups, group_size] -> [..., in], without the padding."""
    return groups.flatten(-2)[..., :features]


def nearest(groups: Tensor, scale: Tensor, offset: Tensor, top: Tensor) -> Tensor:
    """Nearest integers of [..., groups, group_size] weights on grids that broadcast to them, float32."""
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (groups * inverse + offset).round_().clamp_(min=0).minimum(top)
