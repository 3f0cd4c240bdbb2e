"""Kernels: ways to compute with packed weights, by name."""

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
        activation: one of `ACTIVATIONS`: what joins the products with gate and up.
        gate_bias: [experts, width] float32, or None.
        up_bias: [experts, width] float32, or None.
        down_bias: [experts, hidden] float32, or None.
        patches: channels with bits of their own, in the order in which they count.
        prepared: what a kernel made of this stack.
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
        """All of them, and those of the patches."""
        patched = [channels.matrix for patch in self.patches for channels in patch.channels()]
        return [*self.gate, *self.up, *self.down, *patched]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prepared": None}


class Kernels(Protocol):
    """One implementation of the two products, and of the two loops of quantization."""

    name: str
    takes_patches: bool  # in `experts`; what does not is computed product by product where a layer has patches

    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device of this machine; None if it can."""

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x, float32 or bfloat16; bias is [out]."""

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Gate-weighted sum over the experts of each token.

        Args:
            stack: the experts.
            x: [tokens, hidden] float32 or bfloat16.
            index: [tokens, top_k] expert of each token, int64; an index that no expert has means none.
            weights: [tokens, top_k] gate weights.

        Returns:
            [tokens, hidden] in the dtype of x.
        """

    def fit_grid(self, weights: Tensor, widths: Tensor, scheme: Scheme, importance: Tensor | None) -> Rounded:
        """Grids with the smallest (weighted) squared rounding error per group.

        Args:
            weights: [matrices, out, in] float32 or bfloat16.
            widths: [matrices, out] bits of each row, int.
            scheme: group size, symmetry and scale dtype.
            importance: [matrices, in] weight of each input feature's squared error, float32; None means equal.
        """

    def fit_packed(self, weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        """What `fit_grid` finds, as it is stored.

        Args:
            weights: [out, in] float32 or bfloat16.
            scheme: how.

        Returns:
            By suffix, see `Scheme.tensors`.
        """

    def round_columns(self, columns: Columns, values: Tensor, first: int) -> None:
        """Round a block of columns, the last one first; errors made in it go into those before.

        Args:
            columns: the stack, which is changed.
            values: [matrices, block, out] float32, what the columns `first`, ... of the order are by now.
            first: where in the order the block begins.
        """

    def pack(self, integers: Tensor, width: int) -> list[Tensor]:
        """Planes of [out, in] uint8 integers, as `moqa.format.planes.pack` makes them."""


KERNELS: dict[str, Kernels] = {}


def register(kernels: Kernels) -> Kernels:
    """Add kernels to the registry."""
    KERNELS[kernels.name] = kernels
    return kernels


def find_kernels(name: str = "auto", device: torch.device | str = "cpu") -> Kernels:
    """Kernels by name; `auto` is the fastest that run on the device.

    >>> find_kernels("reference").name
    'reference'

    Raises:
        MoqaError: if there are none of that name, or they do not run here.
    """
    device = torch.device(device)
    reasons = {found.name: found.unusable(device) for found in KERNELS.values()}
    if name == "auto":
        return next(KERNELS[found] for found, reason in reasons.items() if reason is None)
    if name not in KERNELS:
        raise MoqaError(f"there are no kernels named {name!r}", f"choose auto, {', '.join(KERNELS)}")
    if reasons[name] is not None:
        raise MoqaError(f"kernels {name!r} do not run on {device}", str(reasons[name]))
    return KERNELS[name]
