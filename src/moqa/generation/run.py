"""`moqa.generate`: continue a text, streamed in pieces."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, computed_field

from moqa.errors import MoqaError
from moqa.generation.choice import Token
from moqa.generation.grammar import Grammar
from moqa.generation.loop import Chunk, ContextError, check_room, end_tokens, tokens
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.sampling import Sampling
from moqa.generation.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reason = Literal["stop", "length"]
_LONG = 8  # characters of a token; few texts have more on average
_CUT = 64


class Finish(BaseModel, frozen=True):
    """How a text ended, with token counts and times."""

    finish_reason: Reason = Field(
        description="stop: an end token, stop string or the end of the grammar; length: max_tokens"
    )
    prompt_tokens: int
    cached_tokens: int = Field(description="tokens of the prompt that were in the cache")
    completion_tokens: int = Field(description="tokens that were written, including an end token")
    prefill_seconds: float = Field(description="time to the first token, excluding time spent on other texts")
    decode_seconds: float = Field(description="time of all further tokens, excluding time spent on other texts")

    @computed_field(description="tokens per second after the first token; None if there was only one")  # type: ignore[prop-decorator]
    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed of all tokens after the first."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.completion_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Piece:
    """Output of one step; it has no text within a prompt, within a character, or while a stop string may begin."""

    text: str = ""
    tokens: tuple[
        tuple[Token, int], ...
    ] = ()  # tokens of the text, and the position in the whole text where each begins
    completion_tokens: int = 0  # written so far
    finish: Finish | None = None  # in the last piece


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    memory: PromptCache | None = None,
) -> Iterator[Piece]:
    """Continue a text, streamed in pieces.

    >>> pieces = list(moqa.generate(model, tokenizer, "The history of", Sampling(max_tokens=8, temperature=0)))
    >>> "".join(piece.text for piece in pieces)
    ' the ...'
    >>> pieces[-1].finish.finish_reason
    'length'

    Args:
        model: a causal language model of transformers, e.g. from `moqa.load`.
        tokenizer: of the model.
        prompt: text, or its tokens.
        sampling: how to continue it; what it does not say, the model's generation_config.json does.
        memory: cache of an earlier text; a common beginning is not read again. It is updated.

    Returns:
        One piece per step (a chunk of the prompt, or a token); the last piece has `finish`.

    Raises:
        MoqaError: if the prompt is empty, has unknown tokens, or leaves too little of the context for the new tokens;
            if the grammar cannot be used; or if generation_config.json has a value out of range.
    """
    sampling = (sampling or Sampling()).completed(model)
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    return _Pieces(model, tokenizer, ids, sampling, memory or PromptCache())


def begin_grammar(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sampling: Sampling) -> Grammar | None:
    """The beginning of a text's grammar, if it has one; it is compiled once.

    >>> begin_grammar(model, tokenizer, Sampling(grammar='start: "yes" | "no"')).complete
    False

    Raises:
        MoqaError: if the grammar cannot be used.
    """
    if sampling.grammar is None:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    return Grammar.of(sampling.grammar, tokenizer, vocabulary, sorted(end_tokens(model)))


def encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = True, context: int | None = None
) -> list[int]:
    """Tokenize a prompt.

    >>> encode(tokenizer, "The history of")
    [599, 3523, 298]

    Args:
        tokenizer: of the model.
        text: any text.
        special: add the special tokens that the model expects, usually one at the beginning.
        context: most tokens that can be used; a text that surely has more is not tokenized to its end.

    Raises:
        MoqaError: if the text is not valid Unicode, or surely longer than the context.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MoqaError("the prompt is not valid Unicode text", error.reason) from None
    if context is not None and len(text) > _LONG * context:
        # where a beginning is cut, it may have a few tokens more than the whole text has there
        begins = tokenizer(text[: _LONG * context], add_special_tokens=False, verbose=False)["input_ids"]
        if len(begins) > context + _CUT:
            raise ContextError(
                f"the prompt has more than {len(begins) - _CUT} tokens", f"the context of the model holds {context}"
            )
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


class _Pieces(Iterator[Piece]):
    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        ids: Sequence[int],
        sampling: Sampling,
        memory: PromptCache,
    ) -> None:
        self._limit = check_room(model, ids, sampling)
        self._grammar = begin_grammar(model, tokenizer, sampling)
        self._tokens = tokens(model, ids, sampling, memory, self._grammar)
        self._ends, self._echo = end_tokens(model), sampling.echo
        self._words = Detokenizer(tokenizer, () if sampling.echo else ids, sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop)
        self._waiting: deque[tuple[Token, int]] = deque()  # tokens whose text is held back, and where they begin
        self._length = self._given = 0  # characters of the text so far, and of the text returned so far
        self._prompt, self._cached, self._echoed, self._count = len(ids), memory.reused, 0, 0
        self._prefill = self._decode = 0.0
        self._finish: Finish | None = None

    def __next__(self) -> Piece:
        if self._finish:
            raise StopIteration
        start = perf_counter()
        step = next(self._tokens)
        if isinstance(step, Token):
            self._count += 1
            text, written, reason = self._write(step)
        else:
            text, written, reason = self._read(step)
        spent = perf_counter() - start
        if self._count > 1:
            self._decode += spent
        else:
            self._prefill += spent
        if reason:
            self._finish = Finish(
                finish_reason=reason, prompt_tokens=self._prompt, cached_tokens=self._cached,
                completion_tokens=self._count, prefill_seconds=self._prefill, decode_seconds=self._decode,
            )  # fmt: skip
        return Piece(text, written, self._count, self._finish)

    def _read(self, chunk: Chunk) -> tuple[str, tuple[tuple[Token, int], ...], Reason | None]:
        """The same as `_write` for a chunk of the prompt, which no stop string ends."""
        before = self._length
        texts, written = [], []
        for token in chunk or ():
            written.append((token, self._length))
            texts.append(self._words.push(token.id))
            self._length += len(texts[-1])
        self._echoed += len(written)
        ends = self._limit == 0 and self._echoed == self._prompt
        if ends:
            texts.append(self._words.flush())
        self._given += self._length - before
        return "".join(texts), tuple(written), "length" if ends else None

    def _write(self, token: Token) -> tuple[str, tuple[tuple[Token, int], ...], Reason | None]:
        """Text that can be returned after a token, the tokens it consists of, and the reason if this is the end."""
        ends = token.id in self._ends
        reason: Reason | None = "length" if self._count == self._limit else None
        if ends or (self._grammar is not None and self._grammar.complete):
            reason = "stop"
        new = ""
        # clients of echoed prompts expect one token more than the prompt has, even if it ends the text
        if not ends or self._echo:
            self._waiting.append((token, self._length))
        if not ends:
            new = self._words.push(token.id)
        if reason:
            new += self._words.flush()
        self._length += len(new)
        text, hit = self._stops.push(new)
        if reason and not hit:
            text += self._stops.flush()
        self._given += len(text)
        everything = reason and not hit
        written = []
        while self._waiting and (everything or self._waiting[0][1] < self._given):
            written.append(self._waiting.popleft())
        return text, tuple(written), "stop" if hit else reason
