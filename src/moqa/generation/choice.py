"""Choosing a token from logits, and what is reported about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.generation.grammar import Grammar
from moqa.generation.processors import processors
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Token:
    """One token; log-probabilities are the model's own, before temperature and other sampling options."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, if asked for


@torch.inference_mode()
def reported(ids: Sequence[int], logits: Tensor, top: int) -> tuple[Token, ...]:
    """Tokens with their log-probabilities.

    >>> reported([1], torch.tensor([[0.0, 0.0]]), top=0)
    (Token(id=1, logprob=-0.693..., top=()),)

    Args:
        ids: the tokens.
        logits: [tokens, vocabulary] logits that each was chosen from.
        top: number of likeliest tokens to report for each.
    """
    logprobs = logits.log_softmax(-1)
    likeliest = logprobs.topk(min(top, logprobs.shape[1]))
    own = logprobs.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]
    rows = zip(ids, own.tolist(), likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return tuple(Token(token, value, tuple(zip(*others, strict=True))) for token, value, *others in rows)


class Chooser:
    """Chooses a token from logits, with the processors of transformers and one random generator per text.

    Args:
        sampling: how to choose.
        memory: cache of the text, which knows its tokens.
        prompt: number of tokens of the prompt.
        grammar: what may be written; it follows what is chosen.
    """

    def __init__(self, sampling: Sampling, memory: PromptCache, prompt: int, grammar: Grammar | None) -> None:
        self._sampling, self._memory, self._grammar = sampling, memory, grammar
        self._processors = processors(sampling, prompt)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Token:
        """Choose the next token from [vocabulary] logits."""
        scores = logits[None]
        if self._grammar is not None:
            scores = scores.masked_fill(~self._grammar.allowed(), -torch.inf)
        if self._processors:
            sampling = self._sampling
            looks_back = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
            scores = self._processors(torch.tensor([self._memory.ids if looks_back else []]), scores)
        token = self._likeliest(scores[0]) if self._sampling.greedy else self._drawn(scores[0])
        if self._grammar is not None:
            self._grammar.follow(token)
        if self._sampling.logprobs is None:
            return Token(token)
        return reported([token], logits[None], self._sampling.logprobs)[0]

    def _likeliest(self, scores: Tensor) -> int:
        token = int(scores.argmax())
        _check(float(scores[token]))
        return token

    def _drawn(self, scores: Tensor) -> int:
        # one uniform random number and a binary search: an order of magnitude faster than torch.multinomial
        sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        _check(float(sums[-1]))
        number = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        return min(int(torch.searchsorted(sums, number, right=True)), len(sums) - 1)


def _check(value: float) -> None:
    if math.isnan(value):
        raise MoqaError("the model's logits are NaN", "its weights are damaged")
