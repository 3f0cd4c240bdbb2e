"""How far a policy's vision has moved from its language, at three levels, and its actions from what they were.

All four are zero for equal tensors and grow with the square of a small change, so that those of several units add up.
What EaqVLA (arXiv 2505.21567) measures at which level is not public and its authors asked for its retraction: the
formulas are ours.
"""

import torch
from torch import Tensor

LEVELS = ("module", "layer", "token")


def module_shift(tokens: Tensor, moved: Tensor) -> float:
    """1 - CKA of the projected tokens: whether they lie to each other as before.

    >>> tokens = torch.randn(64, 16)
    >>> rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    >>> abs(module_shift(tokens, tokens @ rotation)) < 1e-5
    True

    Args:
        tokens: [tokens, features] of the original, float32.
        moved: [tokens, features] with something quantized.

    Linear centred kernel alignment, arXiv 1905.00414, equation 3 (in the form for features).
    """
    x, y = (part.double() - part.double().mean(0) for part in (tokens, moved))
    between, own, other = ((a.T @ b).square().sum() for a, b in ((x, y), (x, x), (y, y)))
    scale = (own * other).sqrt()
    return float(1 - between / scale) if scale > 0 else 0.0


def layer_shift(outputs: Tensor, moved: Tensor) -> float:
    """Squared relative error of a block's outputs.

    >>> layer_shift(torch.ones(4, 8), torch.full((4, 8), 1.5))
    0.25

    Args:
        outputs: of the original, any shape.
        moved: with something quantized, the same shape.
    """
    return float((moved - outputs).square().sum() / outputs.square().sum().clamp_min(1e-30))


def token_shift(tokens: Tensor, moved: Tensor, words: Tensor) -> float:
    """How far each projected token has turned, and how far its attention over words has shifted.

    >>> tokens, words = torch.randn(64, 16), torch.randn(10, 16)
    >>> round(token_shift(tokens, 2 * tokens, words[:0]), 5)
    0.0

    Args:
        tokens: [tokens, features] of the original, float32.
        moved: [tokens, features] with something quantized.
        words: [words, features] embeddings of the instructions' vocabulary; none for a policy that is told nothing.

    Returns:
        Mean over tokens of 1 - cosine, plus the KL divergence in nats between softmax(token . words / temperature) of
        both. The temperature makes the logits' standard deviation 1, so that no word takes all.
    """
    turned = (1 - torch.cosine_similarity(tokens, moved, dim=-1)).clamp_min(0).mean()
    if not len(words):
        return float(turned)
    logits = tokens @ words.T
    temperature = logits.std().clamp_min(1e-6)
    before, after = ((part / temperature).log_softmax(-1) for part in (logits, moved @ words.T))
    return float(turned + (before.exp() * (before - after)).sum(-1).clamp_min(0).mean())


def action_shift(actions: Tensor, moved: Tensor) -> float:
    """Mean squared length of the change of an action.

    >>> action_shift(torch.zeros(2, 8, 4), torch.ones(2, 8, 4))
    4.0

    Args:
        actions: [observations, chunk, action] of the original.
        moved: with something quantized.
    """
    return float((moved - actions).square().sum(-1).mean())
