"""`table` and `trellis`: codes of symmetric levels, in planes, with a scale per row and a factor per group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moqa.format.encodings.encoding import Encoding, Parameters, TensorSpec
from moqa.format.encodings.integers import plane_tensors
from moqa.format.levels import UPPER_LEVELS, LevelGrid, unpack_factors
from moqa.format.planes import unpack
from moqa.format.tiles import BLOCK, PLANES, TILE


class Coded(Encoding):
    """See `Encoding`; suffixes are `p0`, `p1`, ... for the planes of the codes, `scale` and `factor`.

    Args:
        name: `table`, where a code is the index of its level, or `trellis`, where that also depends on other codes.
    """

    def __init__(self, name: str) -> None:
        self.name, self.widths = name, tuple(UPPER_LEVELS[name])

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """See `Encoding`."""
        tiles, groups = -(-shape[0] // TILE), -(-shape[1] // scheme.group_size)
        stored = plane_tensors(scheme.width, tiles, -(-shape[1] // BLOCK))
        stored["scale"] = (getattr(torch, scheme.scale_dtype), (tiles, TILE))
        stored["factor"] = (torch.uint8, (tiles, groups, 12))
        return stored

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding`."""
        # all rows of the last tile: levels of the first rows depend on their codes, whatever they are
        out, features = tensors["scale"].numel(), shape[1]
        scale, factor = tensors["scale"].flatten(), unpack_factors(tensors["factor"], out)
        width = torch.full_like(scale, scheme.width, dtype=torch.uint8)
        planes = [tensors[f"p{index}"] for index in range(len(PLANES[scheme.width]))]
        grid = LevelGrid(self.name, scale, factor, scheme.group_size, width, (out,))
        return grid.decode(unpack(planes, scheme.width, (out, features)))[: shape[0]]
