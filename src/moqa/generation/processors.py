"""The processors that turn logits into scores of the next token: transformers', a faster top-p (nucleus), penalties."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
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


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalties, as in OpenAI's API reference.

    >>> Penalties(1.0, 0.5, prompt=1)(torch.tensor([[2, 0, 0]]), torch.zeros(1, 3))
    tensor([[-2.,  0.,  0.]])

    Args:
        presence: subtracted from the logits of tokens that were written.
        frequency: subtracted for each time that a token was written.
        prompt: number of tokens of the prompt, which do not count.
    """

    def __init__(self, presence: float, frequency: float, prompt: int) -> None:
        self._presence, self._frequency, self._prompt = presence, frequency, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """[1, vocabulary] logits after [1, tokens] ids."""
        written, counts = ids[:, self._prompt :].unique(return_counts=True)
        return scores.index_add(1, written, -(self._presence + self._frequency * counts)[None])


class Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of tokens.

    >>> Bias({2: -100})(None, torch.zeros(1, 3))
    tensor([[   0.,    0., -100.]])

    Args:
        bias: token -> what is added.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._values = torch.tensor(list(bias)), torch.tensor([list(bias.values())], dtype=torch.float32)

    def __call__(self, ids: Tensor | None, scores: Tensor) -> Tensor:  # noqa: ARG002
        """[1, vocabulary] logits."""
        return scores.index_add(1, self._tokens, self._values)


def processors(sampling: Sampling, prompt: int) -> LogitsProcessorList:
    """Those that the options ask for, in transformers' order, for a prompt of so many tokens."""
    found = LogitsProcessorList()
    if sampling.logit_bias:
        found.append(Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, prompt))
    if not sampling.greedy:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(Nucleus(sampling.top_p))
        if sampling.min_p:
            found.append(MinPLogitsWarper(sampling.min_p))
    return found
