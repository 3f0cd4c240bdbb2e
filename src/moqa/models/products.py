"""Matrix products with weights that are stored in a narrower dtype than the one of the computation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# rows of the smallest product and of the largest
_FEWEST_ROWS, _MOST_ROWS = 2**6, 2**11


def filled_up(rows: int) -> int:
    """A number of rows, rounded up to whole blocks.

    >>> filled_up(100)
    128
    """
    return -(-rows // _FEWEST_ROWS) * _FEWEST_ROWS


def in_blocks(rows: int) -> Iterator[slice]:
    """Rows in blocks of few different sizes: powers of two, if `rows` comes from `filled_up`.

    >>> list(in_blocks(2 * 2048 + 384))
    [slice(0, 2048, None), slice(2048, 4096, None), slice(4096, 4352, None), slice(4352, 4480, None)]

    oneDNN compiles code for every new shape of a product. That takes as long as the product itself, several times as
    long for a small one, and the code stays in memory.
    """
    begin = 0
    while begin < rows:
        left = rows - begin
        size = left if left < _FEWEST_ROWS else min(1 << left.bit_length() - 1, _MOST_ROWS)
        yield slice(begin, begin + size)
        begin += size


def product(x: Tensor, matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[..., in] x [in, out] -> [..., out] in the dtype of x.

    >>> product(torch.ones(2, 3), torch.ones(3, 4, dtype=torch.bfloat16)).dtype
    torch.float32

    Args:
        x: the left side.
        matrix: the right side; it gets no gradient if its dtype is not that of the product.
        dtype: both sides, and the float32 sums, are rounded to it; None means that of x.
    """
    dtype = dtype or x.dtype
    return x @ matrix if x.dtype == matrix.dtype == dtype else _Product.apply(x, matrix, dtype)


class _Product(torch.autograd.Function):
    """Converts the matrix for the product, and again for the gradient, instead of keeping the copy in between."""

    @staticmethod
    def forward(context: Any, x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        context.matrix, context.dtype = matrix, dtype
        return _multiplied(x, matrix, dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(gradient, context.matrix.T, context.dtype), None, None


def _multiplied(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The product computed in `dtype`, returned in the dtype of x."""
    right = matrix.to(dtype)
    if x.dtype == dtype:
        return x @ right  # compiles nothing
    rows = x.shape[:-1].numel()
    left = x.new_empty(filled_up(rows), x.shape[-1], dtype=dtype)
    left[:rows] = x.reshape(rows, x.shape[-1])
    left[rows:] = 0
    out = left.new_empty(len(left), right.shape[1])
    for block in in_blocks(len(left)):
        torch.mm(left[block], right, out=out[block])
    return out[:rows].to(x.dtype).view(*x.shape[:-1], right.shape[1])


def fast_dtype(stored: torch.dtype) -> torch.dtype | None:
    """Dtype to multiply in with weights that are stored in a dtype: bfloat16, or None for that of the computation.

    >>> fast_dtype(torch.float32) is None
    True
    """
    native = stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else None


@contextmanager
def fast_sums() -> Iterator[None]:
    """A `with` block in which float32 products may use bfloat16 instructions.

    >>> x = torch.ones(4, 2)
    >>> with fast_sums():
    ...     x.T @ x
    tensor([[4., 4.],
            [4., 4.]])

    Where the processor has such instructions, both sides are rounded to bfloat16 and summed in float32. That is good
    enough for statistics over many inputs, which are not more exact themselves.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
