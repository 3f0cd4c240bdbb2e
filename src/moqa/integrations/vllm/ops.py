"""`torch.ops.moqa.linear` and `torch.ops.moqa.experts`: what vLLM's compiled and plain models call.

A graph knows a layer by its buffer of weights, so that layers of the same shapes share one compiled graph; the matrices
in the buffer are found by its address.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moqa.kernels import ExpertStack, PackedMatrix, ProductKernels
from moqa.runtime.variants import Variants

_library = torch.library.Library("moqa", "FRAGMENT")


@dataclass(eq=False)
class ServedLinear:
    """The matrices of a linear layer, whose outputs stand side by side.

    Attributes:
        matrices: each in a scheme of its own.
        rows: outputs of each; the rest of its rows are silent.
        kernels: that multiply.
    """

    matrices: list[PackedMatrix]
    rows: list[int]
    kernels: ProductKernels

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., all rows]."""
        biases = [None] * len(self.rows) if bias is None else list(bias.split(self.rows))
        products = []
        for matrix, rows, one in zip(self.matrices, self.rows, biases, strict=True):
            product = self.kernels.linear(matrix, x, one if matrix.shape[0] == rows else None)[..., :rows]
            products.append(product if one is None or matrix.shape[0] == rows else product + one.to(product.dtype))
        return products[0].contiguous() if len(products) == 1 else torch.cat(products, -1)


@dataclass(eq=False)
class ServedExperts:
    """The routed experts of a layer that a process has.

    Attributes:
        stack: the checkpoint's matrices.
        kernels: that multiply.
        variants: of the model.
        layer: index of the layer, which variants use.
    """

    stack: ExpertStack
    kernels: ProductKernels
    variants: Variants
    layer: int

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; an index out of range stands for no expert."""
        return self.kernels.experts(self._in_use(), x, index, weights)

    def _in_use(self) -> ExpertStack:
        variant, plain = self.variants.of_layer(self.layer), self.stack
        if variant is None:
            return plain
        if variant.stack is None:
            replaced = variant.matrices

            def part(name: str, matrices: Sequence[PackedMatrix]) -> list[PackedMatrix]:
                return [replaced.get((expert, name), matrix) for expert, matrix in enumerate(matrices)]

            variant.stack = ExpertStack(
                part("gate_proj", plain.gate), part("up_proj", plain.up), part("down_proj", plain.down),
                plain.activation, patches=variant.patches,
            )  # fmt: skip
        return variant.stack


_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def serve(weights: Tensor, layer: ServedLinear | ServedExperts) -> None:
    """Let the operators compute with a layer wherever they are given its buffer; the caller keeps both alive.

    >>> from moqa.kernels import find_kernels
    >>> serve(torch.zeros(1, dtype=torch.uint8), ServedLinear([matrix], [matrix.shape[0]], find_kernels()))
    """
    _layers[weights.data_ptr()] = layer


def _layer(weights: Tensor) -> Any:
    found = _layers.get(weights.data_ptr())
    if found is None:
        raise RuntimeError("a layer's weights were moved after they were loaded")
    return found


def _linear(x: Tensor, weights: Tensor, bias: Tensor | None, out: int) -> Tensor:  # noqa: ARG001  (of the fake one)
    product: Tensor = _layer(weights)(x, bias)
    return product


def _experts(x: Tensor, weights: Tensor, index: Tensor, gates: Tensor, places: Tensor | None) -> Tensor:
    product: Tensor = _layer(weights)(x, index if places is None else places[index.long()], gates)
    return product


def _empty_linear(x: Tensor, _weights: Tensor, _bias: Tensor | None, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _empty_experts(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Implementation(Protocol):
    def __call__(self, *arguments: Any) -> Tensor: ...


def _define(name: str, schema: str, implementation: _Implementation, empty: _Implementation) -> None:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moqa::{name}", empty, lib=_library)


_define("linear", "(Tensor x, Tensor weights, Tensor? bias, int out) -> Tensor", _linear, _empty_linear)
_define(
    "experts", "(Tensor x, Tensor weights, Tensor index, Tensor gates, Tensor? places) -> Tensor", _experts,
    _empty_experts,
)  # fmt: skip
