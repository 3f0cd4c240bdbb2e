"""Products with weights that are stored in fewer bits than are computed with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# rows of the smallest product and of the largest
_LEAST, _MOST = 2**6, 2**11


def filled_up(rows: int) -> int:
    """So many rows and those that are missing to whole blocks.

    >>> filled_up(100)
    128
    """
    return -(-rows // _LEAST) * _LEAST


def in_blocks(rows: int) -> Iterator[slice]:
    """Rows in blocks of few sizes, powers of two if they are filled up.

    >>> list(in_blocks(2 * 2048 + 384))
    [slice(0, 2048, None), slice(2048, 4096, None), slice(4096, 4352, None), slice(4352, 4480, None)]

    A product of another shape is compiled anew, which takes as long as computing it, or several times as long if it is
    small, and its code stays in memory.
    """
    begin = 0
    while begin < rows:
        left = rows - begin
        size = left if left < _LEAST else min(1 << left.bit_length() - 1, _MOST)
        yield slice(begin, begin + size)
        begin += size


def product(x: Tensor, matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[..., in] x [in, out] -> [..., out] in the dtype of x.

    >>> product(torch.ones(2, 3), torch.ones(3, 4, dtype=torch.bfloat16)).dtype
    torch.float32

    Args:
        x: the left side.
        matrix: the right side; it gets no gradient if its dtype is another one.
        dtype: what both are rounded to, float32 sums are then rounded to it too; None: that of x.
    """
    dtype = dtype or x.dtype
    return x @ matrix if x.dtype == matrix.dtype == dtype else _Product.apply(x, matrix, dtype)


class _Product(torch.autograd.Function):
    """A matrix in another dtype is converted when it is needed, for the gradient a second time, and not kept."""

    @staticmethod
    def forward(context: Any, x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        context.matrix, context.dtype = matrix, dtype
        return _multiplied(x, matrix, dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(gradient, context.matrix.T, context.dtype), None, None


def _multiplied(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of both in another dtype, in that of x."""
    right = matrix.to(dtype)
    if x.dtype == dtype:
        return x @ right  # nothing is compiled for that
    rows = x.shape[:-1].numel()
    left = x.new_empty(filled_up(rows), x.shape[-1], dtype=dtype)
    left[:rows] = x.reshape(rows, x.shape[-1])
    left[rows:] = 0
    out = left.new_empty(len(left), right.shape[1])
    for block in in_blocks(len(left)):
        torch.mm(left[block], right, out=out[block])
    return out[:rows].to(x.dtype).view(*x.shape[:-1], right.shape[1])


def fast_dtype(stored: torch.dtype) -> torch.dtype | None:
    """What to multiply in with weights that are stored in a dtype: bfloat16, or None for what is computed with.

    >>> fast_dtype(torch.float32) is None
    True
    """
    native = stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else None


@contextmanager
def fast_sums() -> Iterator[None]:
    """A block in which float32 is multiplied by the fastest library.

    >>> with fast_sums():
    ...     gram = x.T @ x

    It may round both sides to bfloat16 where the processor has instructions for that, and sums up in float32: good for
    sums over many inputs, which are no more exact themselves.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
