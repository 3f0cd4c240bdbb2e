"""The grid with the smallest rounding error: a search over clipped ranges, then least-squares refits."""

import torch
from torch import Tensor

from moqa.format.scheme import Scheme
from moqa.kernels import Rounded, find_grid_kernels


def fit_grid(
    weights: Tensor, scheme: Scheme, widths: Tensor | None = None, importance: Tensor | None = None
) -> Rounded:
    """Round weights on the grid with the smallest (weighted) squared error per group.

    >>> fit_grid(torch.randn(4, 64), Scheme(width=3)).integers.max() <= 7
    tensor(True)

    Args:
        weights: [matrices, out, in] or [out, in] float32 or bfloat16.
        scheme: group size, symmetry and scale dtype; its width is used if `widths` is None.
        widths: [matrices] or [matrices, out] bits of each matrix or row, int, to fit mixed widths at once.
        importance: [matrices, in] or [in] weight of each input feature's squared error, float32; None means equal.

    Returns:
        The grid, with scales and zero-points already rounded as they are stored, and the integers and errors on it.
    """
    stack = weights if weights.dim() == 3 else weights[None]
    bits = torch.tensor(scheme.width) if widths is None else widths
    bits = bits.reshape(*bits.shape, *[1] * (2 - bits.dim())).expand(stack.shape[:2])
    if importance is not None and importance.dim() == 1:
        importance = importance.expand(len(stack), -1)
    rounded = find_grid_kernels(weights.device).fit_grid(stack, bits, scheme, importance)
    return rounded if weights.dim() == 3 else Rounded(rounded.grid[0], rounded.integers[0], rounded.error[0])
