"""Packed modules in pure torch: weights stay planes and scales; a product unpacks what it needs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moqa.format.grid import Grid
from moqa.format.planes import unpack, untile_rows
from moqa.format.scheme import PLANES, Scheme
from moqa.models.experts import projection_rows


class PackedMatrix(nn.Module):
    """One unit as it is stored.

    >>> PackedMatrix(scheme, (256, 256), tensors).dense().shape
    torch.Size([256, 256])

    Args:
        scheme: how it is stored.
        shape: (out, in).
        tensors: by suffix, see `Scheme.tensors`.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, shape
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor)
        self._held: Tensor | None = None

    def dense(self) -> Tensor:
        """[out, in] weights, float32."""
        if self._held is not None:
            return self._held
        if self.scheme.keeps:
            return self.get_buffer("weight").float()
        planes = [self.get_buffer(f"p{index}") for index in range(len(PLANES[self.scheme.width]))]
        zero = None if self.scheme.symmetric else untile_rows(self.get_buffer("zero"), self.shape[0])
        scale = untile_rows(self.get_buffer("scale"), self.shape[0])
        top = torch.tensor(float(self.scheme.levels - 1)).expand(scale.shape)
        grid = Grid(scale, zero, self.scheme.group_size, top)
        return grid.decode(unpack(planes, self.scheme.width, self.shape))

    def hold(self) -> None:
        """Keep the unpacked weights until `release`, for many products in a row."""
        self._held = self.dense()

    def release(self) -> None:
        """Forget the unpacked weights."""
        self._held = None


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = self.matrix.dense().to(x.dtype)
        return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class PackedExperts(nn.Module):
    """All routed experts of a layer, packed; stands in for the stacked parameters (`ExpertWeights`)."""

    def __init__(self, experts: nn.Module, matrices: Mapping[tuple[int, str], PackedMatrix]) -> None:
        super().__init__()
        self._rows = projection_rows(experts)
        self.matrices = nn.ModuleDict({f"{e}:{projection}": matrix for (e, projection), matrix in matrices.items()})

    def gate_up(self, expert: int) -> Tensor:
        """[2 * width, hidden] matrix in the family's own order of gate and up rows."""
        parts = {name: self._dense(expert, name) for name in self._rows}
        first = next(iter(parts.values()))
        stacked = first.new_empty(2 * first.shape[0], first.shape[1])
        for name, rows in self._rows.items():
            stacked[rows] = parts[name]
        return stacked

    def down(self, expert: int) -> Tensor:
        """[hidden, width] matrix."""
        return self._dense(expert, "down_proj")

    def _dense(self, expert: int, projection: str) -> Tensor:
        matrix = self.matrices[f"{expert}:{projection}"]
        assert isinstance(matrix, PackedMatrix)
        return matrix.dense()


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Unpack every matrix below a module once, for a block that uses it many times."""
    matrices = [m for m in module.modules() if isinstance(m, PackedMatrix)]
    for matrix in matrices:
        matrix.hold()
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.release()
