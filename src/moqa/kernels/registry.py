"""Kernels by name: for products with packed weights (`ProductKernels`), and for fitting grids (`GridKernels`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.kernels.fitting import Columns, Rounded
from moqa.kernels.matrix import PackedMatrix, Prepared
from moqa.kernels.patch import Patch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")


@dataclass
class ExpertStack:
    """The matrices of all routed experts of a layer.

    Attributes:
        gate: of each expert, [width, hidden].
        up: of each expert, [width, hidden].
        down: of each expert, [hidden, width].
        activation: one of `ACTIVATIONS`: how the products with gate and up are combined.
        gate_bias: [experts, width] float32, or None.
        up_bias: [experts, width] float32, or None.
        down_bias: [experts, hidden] float32, or None.
        patches: channels with bits of their own, in the order in which they are applied.
        prepared: what kernels derived from this stack and keep.
    """

    gate: Sequence[PackedMatrix]
    up: Sequence[PackedMatrix]
    down: Sequence[PackedMatrix]
    activation: str
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    patches: Sequence[Patch] = ()
    prepared: Prepared | None = field(default=None, repr=False, compare=False)

    def matrices(self) -> list[PackedMatrix]:
        """All matrices, including those of the patches."""
        patched = [channels.matrix for patch in self.patches for channels in patch.channels()]
        return [*self.gate, *self.up, *self.down, *patched]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prepared": None}


class ProductKernels(Protocol):
    """One implementation of the two products with packed weights: a linear layer, and the experts of a layer.

    A new encoding needs kernels of this protocol only, and works with the reference kernels before it has any.
    """

    name: str
    takes_patches: bool  # in `experts`; without it, a layer with patches is computed product by product

    @property
    def encodings(self) -> frozenset[str]:
        """Names of the encodings (`moqa.format.encodings`) that it multiplies."""

    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device of this machine; None if it can."""

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x, float32 or bfloat16; bias is [out]."""

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Gate-weighted sum over the experts of each token.

        Args:
            stack: the experts.
            x: [tokens, hidden] float32 or bfloat16.
            index: [tokens, top_k] experts of each token, int64; an index out of range stands for no expert.
            weights: [tokens, top_k] gate weights.

        Returns:
            [tokens, hidden] in the dtype of x.
        """


class GridKernels(Protocol):
    """One implementation of the two loops of quantization: fitting the grid of each group, and rounding columns."""

    name: str

    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device of this machine; None if it can."""

    def fit_grid(self, weights: Tensor, widths: Tensor, scheme: Scheme, importance: Tensor | None) -> Rounded:
        """Grids with the smallest (weighted) squared rounding error per group.

        Args:
            weights: [matrices, out, in] float32 or bfloat16.
            widths: [matrices, out] bits of each row, int.
            scheme: group size, symmetry and scale dtype.
            importance: [matrices, in] weight of each input feature's squared error, float32; None means equal.
        """

    def fit_packed(self, weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        """Weights on the grids that `fit_grid` finds, as they are stored.

        Args:
            weights: [out, in] float32 or bfloat16.
            scheme: how they are stored.

        Returns:
            By suffix, see `Scheme.tensors`.
        """

    def round_columns(self, columns: Columns, values: Tensor, first: int) -> None:
        """Round a block of columns, the last one first; the error of each is passed on to the columns before it.

        Args:
            columns: the stack, changed in place.
            values: [matrices, block, out] float32, current values of the columns `first`, ... of the order.
            first: position in the order at which the block begins.
        """

    def pack(self, integers: Tensor, width: int) -> list[Tensor]:
        """Planes of [out, in] uint8 integers, the same as `moqa.format.planes.pack` returns."""


# both with the fastest first; `moqa.kernels` fills them
KERNELS: dict[str, ProductKernels] = {}
GRID_KERNELS: dict[str, GridKernels] = {}


def find_kernels(name: str = "auto", device: torch.device | str = "cpu") -> ProductKernels:
    """Kernels for products by name; `auto` is the fastest that run on the device.

    >>> find_kernels("reference").name
    'reference'

    Raises:
        MoqaError: if no kernels have that name, or they do not run here.
    """
    device = torch.device(device)
    if name == "auto":
        return next(kernels for kernels in KERNELS.values() if kernels.unusable(device) is None)
    if name not in KERNELS:
        raise MoqaError(f"there are no kernels named {name!r}", f"choose auto, {', '.join(KERNELS)}")
    reason = KERNELS[name].unusable(device)
    if reason is not None:
        raise MoqaError(f"kernels {name!r} do not run on {device}", reason)
    return KERNELS[name]


def find_grid_kernels(device: torch.device | str = "cpu") -> GridKernels:
    """The fastest kernels that fit grids on a device.

    >>> find_grid_kernels("meta").name
    'reference'
    """
    device = torch.device(device)
    return next(kernels for kernels in GRID_KERNELS.values() if kernels.unusable(device) is None)


def check_encoding(kernels: ProductKernels, matrix: PackedMatrix) -> None:
    """Check that kernels multiply matrices of an encoding.

    >>> check_encoding(find_kernels("reference"), matrix)

    Raises:
        MoqaError: if they do not.
    """
    encoding = matrix.scheme.storage.name
    if encoding not in kernels.encodings:
        able = [other.name for other in KERNELS.values() if encoding in other.encodings]
        raise MoqaError(
            f"kernels {kernels.name!r} do not multiply encoding {encoding!r}",
            f"choose kernels {', '.join(able)}" if able else "no kernels multiply it",
        )
