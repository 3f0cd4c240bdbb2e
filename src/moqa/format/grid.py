"""The integer grid: which numbers a group of weights can take, and the best such grid for given weights."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moqa.format.scheme import Scheme

# Zero-points are stored in a byte whatever the width is: 1/255 of the grid's span per step.
ZERO_STEPS = 255
# twice as many gain nothing below 4 bits, where the refits do the rest, and 1 % at 4
_SHRINKS = (1.0, 0.95, 0.9, 0.82, 0.72, 0.6)
_REFITS = 3
# a fit passes over its weights dozens of times: pieces that stay in the cache are ten times faster than whole stacks
_CHUNK_WEIGHTS = 2**18


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
        integers = _nearest(groups, self.scale.float()[..., None], self.offset()[..., None], self.top[..., None])
        return from_groups(integers, weights.shape[-1]).to(torch.uint8)

    def decode(self, integers: Tensor) -> Tensor:
        """Weights of [..., out, in] grid integers, float32."""
        groups = to_groups(integers.float(), self.group_size)
        values = self.scale.float()[..., None] * (groups - self.offset()[..., None])
        return from_groups(values, integers.shape[-1])

    def __getitem__(self, index: object) -> "Grid":
        zero = None if self.zero is None else self.zero[index]  # type: ignore[index]
        return Grid(self.scale[index], zero, self.group_size, self.top[index])  # type: ignore[index]


def to_groups(weights: Tensor, group_size: int) -> Tensor:
    """[..., in] -> [..., groups, group_size], the last group filled up with zeros."""
    features = weights.shape[-1]
    groups = -(-features // group_size)
    if groups * group_size != features:
        weights = pad(weights, (0, groups * group_size - features))
    return weights.unflatten(-1, (groups, group_size))


def from_groups(groups: Tensor, features: int) -> Tensor:
    """[..., groups, group_size] -> [..., in], the filling dropped."""
    return groups.flatten(-2)[..., :features]


def _nearest(groups: Tensor, scale: Tensor, offset: Tensor, top: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (groups * inverse + offset).round_().clamp_(min=0).minimum(top)


def fit_grid(weights: Tensor, scheme: Scheme, widths: Tensor | None = None, importance: Tensor | None = None) -> Grid:
    """Grid with the smallest (weighted) squared rounding error per group: clip search, then least-squares refits.

    >>> grid = fit_grid(torch.randn(4, 64), Scheme(width=3))
    >>> grid.encode(torch.randn(4, 64)).max() <= 7
    tensor(True)

    Args:
        weights: [matrices, out, in] or [out, in] float32.
        scheme: group size, symmetry and scale dtype; its width holds where `widths` is not given.
        widths: [matrices] or [matrices, out] bits of each matrix or row, int, to fit mixed widths at once.
        importance: [matrices, in] or [in] weight of each input feature's squared error, float32; None means equal.

    Returns:
        The grid, with scales and zero-points already rounded to what is stored.
    """
    rows = weights.shape[-2]
    step = max(1, _CHUNK_WEIGHTS * rows // max(weights.numel(), 1))
    if step >= rows:
        return _fit(weights, scheme, widths, importance)
    by_row = widths is not None and widths.dim() == weights.dim() - 1
    parts = [
        _fit(
            weights[..., i : i + step, :],
            scheme,
            widths[..., i : i + step] if by_row and widths is not None else widths,
            importance,
        )
        for i in range(0, rows, step)
    ]
    zero = None if scheme.symmetric else torch.cat([part.zero for part in parts if part.zero is not None], -2)
    scale, top = (torch.cat(found, -2) for found in zip(*((p.scale, p.top) for p in parts), strict=True))
    return Grid(scale, zero, scheme.group_size, top)


def _fit(weights: Tensor, scheme: Scheme, widths: Tensor | None, importance: Tensor | None) -> Grid:
    groups = to_groups(weights, scheme.group_size)
    # what a short last group is filled up with is not stored and must not count
    weight = to_groups(torch.ones(weights.shape[-1]), scheme.group_size)
    if importance is not None:
        given = to_groups(importance, scheme.group_size)[..., None, :, :]
        # a group whose inputs were never active has no preference; equal weights keep its fit sane
        weight = weight * (given + given.mean(-1, keepdim=True).clamp_min(1e-12) * 1e-2)
    bits = torch.tensor(scheme.width) if widths is None else widths
    bits = bits.reshape(*bits.shape, *[1] * (groups.dim() - 1 - bits.dim()))
    top = (2.0**bits - 1).expand(groups.shape[:-1])
    low = groups.amin(-1).clamp_max(0.0)
    high = groups.amax(-1).clamp_min(0.0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high * (top + 1) / (top - 1).clamp_min(1)
    best, error = None, None
    for shrink in _SHRINKS:
        grid = _stored((high - low) * (shrink / top), low * shrink, scheme, top)
        best, error = _better(groups, weight, grid, best, error)
    assert best is not None
    for _ in range(_REFITS):
        best, error = _better(groups, weight, _refit(groups, weight, best, scheme), best, error)
    return best


def _stored(scale: Tensor, low: Tensor, scheme: Scheme, top: Tensor) -> Grid:
    stored = scale.to(getattr(torch, scheme.scale_dtype))
    if scheme.symmetric:
        return Grid(stored, None, scheme.group_size, top)
    used = stored.float()
    offset = torch.where(used > 0, -low / used, 0.0)
    zero = (offset * (ZERO_STEPS / top)).round().clamp(0, ZERO_STEPS).to(torch.uint8)
    return Grid(stored, zero, scheme.group_size, top)


def _better(groups: Tensor, weight: Tensor, grid: Grid, best: Grid | None, error: Tensor | None) -> tuple[Grid, Tensor]:
    scale, offset = grid.scale.float()[..., None], grid.offset()[..., None]
    rounded = scale * (_nearest(groups, scale, offset, grid.top[..., None]) - offset)
    new = ((rounded - groups).square_() * weight).sum(-1)
    if best is None or error is None:
        return grid, new
    win = new < error
    zero = None if grid.zero is None or best.zero is None else torch.where(win, grid.zero, best.zero)
    return Grid(torch.where(win, grid.scale, best.scale), zero, grid.group_size, grid.top), torch.minimum(new, error)


def _refit(groups: Tensor, weight: Tensor, grid: Grid, scheme: Scheme) -> Grid:
    """Least-squares scale, and offset if there is one, for the integers that the present grid chooses."""
    scale, offset = grid.scale.float()[..., None], grid.offset()[..., None]
    integers = _nearest(groups, scale, offset, grid.top[..., None])
    weight = weight.expand_as(groups)
    if scheme.symmetric:
        steps = integers - offset
        spread = (weight * steps.square()).sum(-1)
        slope = torch.where(spread > 0, (weight * steps * groups).sum(-1) / spread, grid.scale.float()).clamp_min(0)
        return _stored(slope, slope, scheme, grid.top)
    total = weight.sum(-1)
    mean_q, mean_w = (weight * integers).sum(-1) / total, (weight * groups).sum(-1) / total
    centred = integers - mean_q[..., None]
    spread = (weight * centred.square()).sum(-1)
    slope = torch.where(spread > 0, (weight * centred * groups).sum(-1) / spread, grid.scale.float()).clamp_min(0)
    return _stored(slope, mean_w - slope * mean_q, scheme, grid.top)
