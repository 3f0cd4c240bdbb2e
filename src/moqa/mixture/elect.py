"""EMR-Merging: one vector for all fine-tuned variants of a model, and a bit per weight and variant."""

import numpy as np
import torch
from torch import Tensor


def elected(vectors: Tensor) -> Tensor:
    """The unified vector: for each weight the sign of the mean, and the largest size of those that have this sign.

    >>> elected(torch.tensor([[1.0, -2.0], [3.0, 1.0]]))
    tensor([ 3., -2.])

    Args:
        vectors: [variants, ...] what each variant adds to the base, float32.

    EMR-Merging (arXiv 2405.17461), elect.
    """
    sign = vectors.mean(0).sign()
    sizes = torch.where(vectors.sign() == sign, vectors.abs(), 0.0)
    return sign * sizes.amax(0)


def agrees(vector: Tensor, unified: Tensor) -> Tensor:
    """The mask of a variant: where it has the sign of the unified vector.

    >>> agrees(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, -2.0, 1.0]))
    tensor([ True, False, False])
    """
    return vector * unified > 0


def packed_mask(mask: Tensor) -> Tensor:
    """[bytes] eight values of a mask per byte, in its order, the first in the highest bit.

    >>> packed_mask(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def unpacked_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask that was packed.

    >>> unpacked_mask(torch.tensor([160], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel()).astype(bool)).reshape(shape)


def restored_weights(base: Tensor, unified: Tensor, mask: Tensor, rescaler: float) -> Tensor:
    """Weights of a variant, as far as the unified vector has them: base + rescaler * mask * unified.

    >>> restored_weights(torch.ones(2), torch.tensor([3.0, -2.0]), torch.tensor([True, False]), 0.5)
    tensor([2.5000, 1.0000])
    """
    return base.float() + rescaler * unified.float() * mask
