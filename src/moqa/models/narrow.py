"""Products with weights that are stored in fewer bits than are computed with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moqa.models.view import ModelView


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
        return (x.to(dtype) @ matrix.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        back = gradient.to(context.dtype) @ context.matrix.to(context.dtype).T
        return back.to(gradient.dtype), None, None


@contextmanager
def in_stored_precision(view: "ModelView", layer: int) -> Iterator[None]:
    """A block in which a layer's units multiply in bfloat16 if they are stored so and the processor does that natively.

    >>> with in_stored_precision(view, 3):
    ...     stages.layer(3, hidden)

    That is how such a model is served, at several times the speed of float32; everything between the units' products
    stays as it is.
    """
    with ExitStack() as stack:
        for unit in view.layer_units(layer):
            module, dtype = view.module(unit.module), fast_dtype(view.stored_dtype(unit))
            if dtype is None or "moqa_dtype" in vars(module):
                continue
            module.moqa_dtype = dtype  # type: ignore[assignment]
            stack.callback(delattr, module, "moqa_dtype")
            if unit.expert is None:
                module.forward = partial(_linear, module)
                stack.callback(delattr, module, "forward")
        yield


def fast_dtype(stored: torch.dtype) -> torch.dtype | None:
    """What to multiply in with weights that are stored in a dtype: bfloat16, or None for what is computed with.

    >>> fast_dtype(torch.float32) is None
    True
    """
    native = stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else None


def _linear(module: Any, x: Tensor) -> Tensor:
    out = product(x, module.weight.T, module.moqa_dtype)
    return out if module.bias is None else out + module.bias


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
