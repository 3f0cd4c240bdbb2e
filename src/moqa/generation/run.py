"""`moqa.generate`: continue a text, piece by piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, computed_field

from moqa.errors import MoqaError
from moqa.generation.loop import Token, check_room, end_tokens, tokens
from moqa.generation.prompt_cache import PromptCache
from moqa.generation.sampling import Sampling
from moqa.generation.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reason = Literal["stop", "length"]


class Finish(BaseModel, frozen=True):
    """How a text ended, and what it took."""

    finish_reason: Reason = Field(description="stop: an end token or stop string; length: max_tokens")
    prompt_tokens: int
    cached_tokens: int = Field(description="tokens of the prompt that were not read again")
    completion_tokens: int = Field(description="tokens that were written, one that ended the text included")
    prefill_seconds: float = Field(description="to the first token, without time in which others ran")
    decode_seconds: float = Field(description="for all further tokens, without time in which others ran")

    @computed_field(description="further tokens per second of decoding; None if there were none")  # type: ignore[prop-decorator]
    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed of all tokens but the first."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.completion_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave; many steps give no text: in a prompt, in a character, before what may be a stop string."""

    text: str = ""
    tokens: tuple[tuple[Token, int], ...] = ()  # that the text is made of, and where in the whole text each begins
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
    """Continue a text, piece by piece.

    >>> for piece in moqa.generate(model, tokenizer, "The history of", Sampling(max_tokens=8, temperature=0)):
    ...     print(piece.text, end="")
    >>> piece.finish.finish_reason
    'length'

    Args:
        model: a causal language model of transformers, such as `moqa.load` gives.
        tokenizer: of the model.
        prompt: a text, or its tokens.
        sampling: how to continue it; `Sampling()` if None.
        memory: of an earlier text with the same beginning, which is then not read again; it remembers this one.

    Returns:
        One piece per step, which is a chunk of the prompt or a token; the last one has `finish`.

    Raises:
        MoqaError: if the prompt is empty, has unknown tokens, or does not fit the context with what is to be written.
    """
    sampling = sampling or Sampling()
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    return _Pieces(model, tokenizer, ids, sampling, memory or PromptCache())


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = True) -> list[int]:
    """Tokens of a text to be continued.

    >>> encode(tokenizer, "The history of")
    [599, 3523, 298]

    Args:
        tokenizer: of the model.
        text: any text.
        special: begin as the model's texts do, for most with a token for that.

    Raises:
        MoqaError: if it is no Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MoqaError("the prompt is no valid Unicode text", error.reason) from None
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
        self._tokens = tokens(model, ids, sampling, memory)
        self._ends = end_tokens(model)
        self._words = Detokenizer(tokenizer, ids)
        self._stops = StopStrings(sampling.stop)
        self._waiting: deque[tuple[Token, int]] = deque()  # tokens whose text is held back, and where they begin
        self._length = self._given = 0  # characters of the text so far, and of what was given out
        self._prompt, self._cached, self._count = len(ids), memory.reused, 0
        self._prefill = self._decode = 0.0
        self._finish: Finish | None = None

    def __next__(self) -> Piece:
        if self._finish:
            raise StopIteration
        start = perf_counter()
        token = next(self._tokens)
        if token is None:
            self._prefill += perf_counter() - start
            return Piece()
        self._count += 1
        text, written, reason = self._write(token)
        spent = perf_counter() - start
        if self._count == 1:
            self._prefill += spent
        else:
            self._decode += spent
        if reason:
            self._finish = Finish(
                finish_reason=reason, prompt_tokens=self._prompt, cached_tokens=self._cached,
                completion_tokens=self._count, prefill_seconds=self._prefill, decode_seconds=self._decode,
            )  # fmt: skip
        return Piece(text, written, self._count, self._finish)

    def _write(self, token: Token) -> tuple[str, tuple[tuple[Token, int], ...], Reason | None]:
        """Text that a token sets free, the tokens that it is made of, and why it is the last, if it is."""
        ends = token.id in self._ends
        reason: Reason | None = "stop" if ends else "length" if self._count == self._limit else None
        new = ""
        if not ends:
            new = self._words.push(token.id)
            self._waiting.append((token, self._length))
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
