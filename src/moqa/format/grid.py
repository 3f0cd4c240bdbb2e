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
