"""`unquantized`: the matrix as 16-bit floating point; every scheme of width 16 uses it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moqa.format.encodings.encoding import Encoding, Parameters, TensorSpec
from moqa.format.tiles import KEEP_WIDTH


class Unquantized(Encoding):
    """See `Encoding`; the only suffix is `weight`."""

    name = "unquantized"
    widths = (KEEP_WIDTH,)

    def tensors(self, scheme: Parameters, shape: tuple[int, int]) -> dict[str, TensorSpec]:  # noqa: ARG002
        """See `Encoding`."""
        return {"weight": (torch.bfloat16, shape)}

    def decode(self, scheme: Parameters, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """See `Encoding`."""
        return tensors["weight"].float()
