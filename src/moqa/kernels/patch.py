"""Channels of experts with bits of their own, next to the packed matrices: what an adjustment adds to a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moqa.kernels.matrix import PackedMatrix, Prepared

# multiplies [tokens, in] with a matrix: kernels.linear
Multiply = Callable[[PackedMatrix, Tensor], Tensor]


@dataclass
class Channels:
    """Rows of `gate_proj` or `up_proj`, or columns of `down_proj`, of the experts of a layer.

    Attributes:
        matrix: [channels, hidden] rows, or [hidden, channels] columns with a single group.
        expert: [channels] int64, ascending.
        channel: [channels] int64, ascending within an expert.
        scale: [channels] float32 factors of the inputs of columns; None for rows.
    """

    matrix: PackedMatrix
    expert: Tensor
    channel: Tensor
    scale: Tensor | None = None

    def of(self, expert: int) -> slice:
        """Positions of an expert's channels."""
        first, last = torch.searchsorted(self.expert, torch.tensor([expert, expert + 1])).tolist()
        return slice(first, last)


@dataclass
class Patch:
    """Channels of one layer's experts.

    The products with their rows and columns are added to those of the packed matrices, or replace them; a channel that
    one patch of a layer replaces is in no other patch.

    Attributes:
        gate: rows of `gate_proj`, or None.
        up: rows of `up_proj`, or None.
        down: columns of `down_proj`, or None.
        replaces: whether these channels replace the packed ones, rather than being added to them.
        prepared: what kernels derived from this patch and keep.
    """

    gate: Channels | None
    up: Channels | None
    down: Channels | None
    replaces: bool = False
    prepared: Prepared | None = field(default=None, repr=False, compare=False)

    def channels(self) -> list[Channels]:
        """The parts that it has."""
        return [part for part in (self.gate, self.up, self.down) if part is not None]

    def join(self, rows: Channels | None, expert: int, x: Tensor, product: Tensor, multiply: Multiply) -> Tensor:
        """An expert's [tokens, width] product with gate or up, with the patch's rows applied."""
        at = slice(0, 0) if rows is None else rows.of(expert)
        if rows is None or at.start == at.stop:
            return product
        extra = multiply(rows.matrix, x)[:, at].to(product.dtype)
        channels = rows.channel[at]
        product = product.clone()
        product[:, channels] = extra if self.replaces else product[:, channels] + extra
        return product

    def choose(self, expert: int, inner: Tensor) -> tuple[Tensor | None, Tensor]:
        """Inputs [tokens, channels] to the patch's columns, and the activations left for the packed columns."""
        columns = self.down
        at = slice(0, 0) if columns is None else columns.of(expert)
        if columns is None or columns.scale is None or at.start == at.stop:
            return None, inner
        channels = columns.channel[at]
        chosen = inner.new_zeros(len(inner), len(columns.channel))
        chosen[:, at] = inner[:, channels] * columns.scale[at].to(inner.dtype)
        return chosen, inner.index_fill(1, channels, 0) if self.replaces else inner


def patched_down(
    patches: Sequence[Patch], expert: int, inner: Tensor, base: Callable[[Tensor], Tensor], multiply: Multiply
) -> Tensor:
    """An expert's [tokens, hidden] output from its [tokens, width] activations; `base` is the packed product."""
    extra = []
    for patch in patches:
        chosen, inner = patch.choose(expert, inner)
        if chosen is not None and patch.down is not None:
            extra.append(multiply(patch.down.matrix, chosen))
    return sum(extra, base(inner))
