"""The generation loop: the prompt in chunks, then one token at a time."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.generation.choice import Chooser, Token, reported
from moqa.generation.grammar import Grammar
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512  # prompt tokens read at a time; limits how long other texts wait, and the memory of a read
_MOST_LOGITS = 2**24  # at a time, if there are some for each token: 64 MiB

# tokens of the prompt, if it is echoed; else None
Chunk = tuple[Token, ...] | None


class ContextError(MoqaError):
    """There are more tokens than the context of the model can hold."""


def tokens(
    model: "PreTrainedModel",
    ids: Sequence[int],
    sampling: Sampling,
    memory: PromptCache | None = None,
    grammar: Grammar | None = None,
) -> Iterator[Token | Chunk]:
    """Continue a text token by token.

    >>> [token.id for token in tokens(model, [599, 3523], Sampling(max_tokens=3, temperature=0)) if token]
    [298, ...]

    Args:
        model: a causal language model of transformers.
        ids: tokens of the text.
        sampling: how to continue it.
        memory: cache of an earlier text; only tokens after a common beginning are read. It is updated.
        grammar: what may be written.

    Returns:
        None after each chunk of the prompt except the last, then tokens. One of `end_tokens`, or the end of the
        grammar, ends the text. With `echo`, the tokens of each chunk instead of None, and of the last chunk as well;
        their log-probabilities if asked for, which the first token has not.

    Raises:
        MoqaError: if there is no token, one is unknown, or the context is too short.
    """
    limit = check_room(model, ids, sampling)
    memory = memory or PromptCache()
    if sampling.echo:
        memory.clear()
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    return _Writing(model, prompt, sampling, memory, grammar).steps(memory.keep(ids), limit)


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
    for what, named in (("the prompt", ids), ("logit_bias", sampling.logit_bias)):
        for token in (min(named), max(named)) if named else ():
            if not 0 <= token < config.vocab_size:
                raise MoqaError(f"{what} has token {token}", f"the model knows 0 to {config.vocab_size - 1}")
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
    return context - len(ids) if sampling.max_tokens is None else sampling.max_tokens


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


@dataclass(frozen=True)
class _Writing:
    model: "PreTrainedModel"
    prompt: Tensor  # [1, tokens]
    sampling: Sampling
    memory: PromptCache
    grammar: Grammar | None

    def steps(self, start: int, limit: int) -> Iterator[Token | Chunk]:
        """Read the prompt from a token on, then write up to a limit."""
        logits = yield from self._echo() if self.sampling.echo else self._read(start)
        choose = Chooser(self.sampling, self.memory, self.prompt.shape[1], self.grammar)
        ends = end_tokens(self.model)
        for left in range(limit, 0, -1):
            token = choose(logits)
            yield token
            if left == 1 or token.id in ends or (self.grammar is not None and self.grammar.complete):
                return
            logits = self.memory.read(self.model, torch.tensor([[token.id]], device=self.prompt.device))

    def _read(self, start: int) -> Generator[Chunk, None, Tensor]:
        *chunks, last = self.prompt[:, start:].split(CHUNK, dim=1)
        for chunk in chunks:
            self.memory.read(self.model, chunk)
            yield None
        return self.memory.read(self.model, last)

    def _echo(self) -> Generator[Chunk, None, Tensor]:
        top = self.sampling.logprobs
        most = CHUNK if top is None else max(1, _MOST_LOGITS // self.model.config.get_text_config().vocab_size)
        logits: list[Tensor] = []  # of the next token, once there are any
        for chunk in self.prompt.split(min(CHUNK, most), dim=1):
            read = chunk[0].tolist()
            if top is None:
                logits = [self.memory.read(self.model, chunk)[None]]
                yield tuple(map(Token, read))
                continue
            after = self.memory.read(self.model, chunk, each=True)
            found = () if logits else (Token(read.pop(0)),)
            yield found + reported(read, torch.cat([*logits, after[:-1]]), top)
            logits = [after[-1:]]
        return logits[0][0]
