"""The generation loop: the prompt in chunks, then one token at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.generation.processors import processors
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512  # prompt tokens read at a time; limits how long other texts wait, and the memory of a read


class ContextError(MoqaError):
    """There are more tokens than the context of the model can hold."""


@dataclass(frozen=True, slots=True)
class Token:
    """One written token; log-probabilities are the model's own, before temperature and other sampling options."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, if asked for


def tokens(
    model: "PreTrainedModel", ids: Sequence[int], sampling: Sampling, memory: PromptCache | None = None
) -> Iterator[Token | None]:
    """Continue a text token by token.

    >>> [token.id for token in tokens(model, [599, 3523], Sampling(max_tokens=3, temperature=0)) if token]
    [298, ...]

    Args:
        model: a causal language model of transformers.
        ids: tokens of the text.
        sampling: how to continue it.
        memory: cache of an earlier text; only tokens after a common beginning are read. It is updated.

    Returns:
        None after each chunk of the prompt except the last, then tokens. One of `end_tokens` ends the text.

    Raises:
        MoqaError: if there is no token, one is unknown, or the context is too short.
    """
    limit = check_room(model, ids, sampling)
    memory = memory or PromptCache()
    return _tokens(model, ids, sampling, memory, memory.keep(ids), limit)


def check_room(model: "PreTrainedModel", ids: Sequence[int], sampling: Sampling) -> int:
    """Number of tokens that may be written after a prompt.

    >>> check_room(model, range(2000), Sampling())
    48

    Raises:
        MoqaError: if there is no token, one is unknown, or the context is too short.
    """
    config = model.config.get_text_config()
    if not len(ids):
        raise MoqaError("the prompt has no tokens", "give at least one")
    for token in (min(ids), max(ids)):
        if not 0 <= token < config.vocab_size:
            raise MoqaError(f"the prompt has token {token}", f"the model knows 0 to {config.vocab_size - 1}")
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        if sampling.max_tokens is None:
            raise MoqaError(f"a {config.model_type} model has no limit on its context", "give --max-tokens")
        return sampling.max_tokens
    wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
    if len(ids) + wanted > context:
        raise ContextError(
            f"{len(ids)} tokens of prompt and {wanted} to write are {len(ids) + wanted}",
            f"the context of the model holds {context}",
        )
    return sampling.max_tokens or context - len(ids)


def end_tokens(model: "PreTrainedModel") -> frozenset[int]:
    """Tokens that end a text.

    >>> end_tokens(model)
    frozenset({0})
    """
    ends: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        ends.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return frozenset(ends)


def _tokens(
    model: "PreTrainedModel", ids: Sequence[int], sampling: Sampling, memory: PromptCache, start: int, limit: int
) -> Iterator[Token | None]:
    choose = _Chooser(sampling, memory)
    ends = end_tokens(model)
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    chunks = prompt[:, start:].split(CHUNK, dim=1)
    for chunk in chunks[:-1]:
        memory.read(model, chunk)
        yield None
    read = chunks[-1]
    for _ in range(limit):
        token = choose(memory.read(model, read))
        yield token
        if token.id in ends:
            return
        read = torch.tensor([[token.id]], device=prompt.device)


class _Chooser:
    """Chooses a token from logits, with the processors of transformers and one random generator per text."""

    def __init__(self, sampling: Sampling, memory: PromptCache) -> None:
        self._sampling, self._memory = sampling, memory
        self._processors = processors(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Token:
        """Choose the next token from [vocabulary] logits."""
        scores = logits[None]
        if self._processors:
            penalised = self._sampling.repetition_penalty != 1
            scores = self._processors(torch.tensor([self._memory.ids if penalised else []]), scores)
        token = self._likeliest(scores[0]) if self._sampling.greedy else self._drawn(scores[0])
        if self._sampling.logprobs is None:
            return Token(token)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Token(token, float(logprobs[token]), tuple(pairs))

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
