"""Rounding that gradients pass through."""

from typing import Any

import torch
from torch import Tensor

from moqa.format.grid import from_groups, nearest, to_groups


class _StraightThrough(torch.autograd.Function):
    """Values in the forward pass, gradients of others."""

    @staticmethod
    def forward(context: object, exact: Tensor, stored: Tensor) -> Tensor:  # noqa: ARG004
        return stored

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def through(exact: Tensor, stored: Tensor) -> Tensor:
    """`stored`, with the gradients of `exact`: the straight-through estimator (arXiv 1308.3432)."""
    found: Tensor = _StraightThrough.apply(exact, stored)
    return found


def whole(exact: Tensor, top: int) -> Tensor:
    """Whole numbers from 0 to `top`."""
    return through(exact, exact.detach().round().clamp(0, top))


def as_stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive numbers as they are stored in a dtype, in float32."""
    found = exact.detach().clamp(0, torch.finfo(dtype).max).to(dtype).float()
    return through(exact, found)


class _OnGrid(torch.autograd.Function):
    """See `on_grid`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, offset: Tensor, top: Tensor, group_size: int) -> Tensor:
        groups, step, zero = to_groups(values, group_size), scale[..., None], offset[..., None]
        integers = nearest(groups, step, zero, top[..., None])
        ctx.group_size = group_size
        ctx.save_for_backward(groups, step, zero, top[..., None], integers)
        return from_groups((integers - zero) * step, values.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        groups, step, zero, top, integers = ctx.saved_tensors
        gradient = to_groups(gradients[0], ctx.group_size)
        position = groups / step + zero
        inside = (position >= 0) & (position <= top) & (step > 0)
        of_values = from_groups(gradient * inside, gradients[0].shape[-1])
        of_scale = gradient * torch.where(inside, integers - position, integers - zero)
        of_offset = torch.where(inside, 0.0, -gradient * step)
        return of_values, of_scale.nan_to_num().sum(-1), of_offset.sum(-1), None, None


def on_grid(values: Tensor, scale: Tensor, offset: Tensor, top: Tensor, group_size: int) -> Tensor:
    """Values on the nearest positions of a grid, with gradients for them and for the grid.

    >>> scale, offset, top = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([[3.0]])
    >>> on_grid(torch.tensor([[0.4, 1.6, 7.0]]), scale, offset, top, group_size=32)
    tensor([[0., 2., 3.]])

    Args:
        values: [..., in] float32.
        scale: [..., groups] value of one step, float32.
        offset: [..., groups] position of zero, float32.
        top: last position, float32, broadcastable to `scale`.
        group_size: values along the last dimension that share a scale.

    Gradients of steps are those of LSQ (arXiv 1902.08153, equation 3), of offsets those of LSQ+ (arXiv 2004.09576,
    equation 7): values outside the range have none, and move its ends.
    """
    found: Tensor = _OnGrid.apply(values, scale, offset, top, group_size)
    return found
