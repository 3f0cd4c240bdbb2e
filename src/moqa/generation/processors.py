"""The processors that turn logits into scores of the next token: transformers', with a faster top-p (nucleus)."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moqa.generation.sampling import Sampling

FIRST = (
    1024  # likeliest tokens to look at first: almost always enough, and 50 times faster than sorting a large vocabulary
)


class Nucleus(LogitsProcessor):  # type: ignore[misc]
    """A faster `TopPLogitsWarper` of transformers, which does not sort the whole vocabulary.

    >>> Nucleus(0.5)(None, torch.tensor([[3.0, 1.0, 0.0]]))
    tensor([[3., -inf, -inf]])

    Args:
        top_p: keeps the smallest set of likeliest tokens whose probabilities sum to this value.
    """

    def __init__(self, top_p: float) -> None:
        self._top_p, self._whole = top_p, TopPLogitsWarper(top_p)

    def __call__(self, ids: Tensor | None, scores: Tensor) -> Tensor:
        """[1, vocabulary] logits, with -inf for the tokens that are left out."""
        likeliest = scores.softmax(-1).topk(min(FIRST, scores.shape[-1]))
        before = likeliest.values.cumsum(-1) - likeliest.values
        if float(before[0, -1]) < self._top_p and len(before[0]) < scores.shape[-1]:
            return self._whole(ids, scores)
        # the likeliest token is always kept, however small top_p is
        kept = likeliest.indices[:, : max(1, int((before < self._top_p).sum()))]
        return torch.full_like(scores, -torch.inf).scatter(1, kept, scores.gather(1, kept))


def processors(sampling: Sampling) -> LogitsProcessorList:
    """Those of transformers that the options ask for, in its order, with a faster top-p."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if not sampling.greedy:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(Nucleus(sampling.top_p))
    return found
