"""`int`: integers on a grid, in planes of 4, 2 and 1 bits, with a scale and a zero-point per group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moqa.format.encodings.encoding import Encoding, Parameters, TensorSpec
from moqa.format.grid import Grid
from moqa.format.planes import unpack, untile_rows
from moqa.format.tiles import BLOCK, PLANES, TILE, WIDTHS


class Integers(Encoding):
    """See `Encoding`; suffixes are `p0`, `p1`, ... for the planes, `scale`, and `zero` unless symmetric."""

    name = "int"
    widths = WIDTHS

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """See `Encoding`."""
        out, features = shape
        tiles, blocks, groups = -(-out // TILE), -(-features // BLOCK), -(-features // scheme.group_size)
        stored = plane_tensors(scheme.width, tiles, blocks)
        stored["scale"] = (getattr(torch, scheme.scale_dtype), (tiles, groups, TILE))
        if not scheme.symmetric:
            stored["zero"] = (torch.uint8, (tiles, groups, TILE))
        return stored

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding`."""
        planes = [tensors[f"p{index}"] for index in range(len(PLANES[scheme.width]))]
        return stored_grid(scheme, shape[0], tensors).decode(unpack(planes, scheme.width, shape))


def stored_grid(scheme: Parameters, out: int, tensors: Mapping[str, Tensor]) -> Grid:
    """The grid of a matrix of `out` rows, from its stored scales and zero-points.

    >>> tensors = {"scale": torch.ones(16, 4, 16), "zero": torch.zeros(16, 4, 16, dtype=torch.uint8)}
    >>> stored_grid(Parameters(width=4), 256, tensors).scale.shape
    torch.Size([256, 4])
    """
    zero = None if scheme.symmetric else untile_rows(tensors["zero"], out)
    scale = untile_rows(tensors["scale"], out)
    top = torch.tensor(2**scheme.width - 1, dtype=torch.float32, device=scale.device).expand(scale.shape)
    return Grid(scale, zero, scheme.group_size, top)


def plane_tensors(width: int, tiles: int, blocks: int) -> dict[str, TensorSpec]:
    """Dtype and shape of the planes of a matrix, by suffix.

    >>> plane_tensors(3, 16, 4)["p1"]
    (torch.uint8, (16, 4, 64))
    """
    return {
        f"p{index}": (torch.uint8, (tiles, blocks, TILE * BLOCK * bits // 8))
        for index, bits in enumerate(PLANES[width])
    }
