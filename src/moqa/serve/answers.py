"""Responses in OpenAI's two formats, complete or as chunks of a stream."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moqa.generation import Finish, Piece, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class Answer:
    """Response format of `/v1/completions`.

    Args:
        model: name of the model.
        tokenizer: turns the tokens of log-probabilities into text.
        logprobs: whether log-probabilities are requested.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    opening: ClassVar[dict[str, Any] | None] = None

    def __init__(self, model: str, tokenizer: "PreTrainedTokenizerBase", logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Sequence[Piece]], note: Mapping[str, Any]) -> dict[str, Any]:
        """The complete response to a request.

        Args:
            texts: all pieces of each text.
            note: further fields in addition to the usage.
        """
        choices = []
        for index, pieces in enumerate(texts):
            tokens = [pair for piece in pieces for pair in piece.tokens]
            joined = Piece("".join(piece.text for piece in pieces), tuple(tokens), finish=pieces[-1].finish)
            choices.append(self._choice(index, joined, self._message(joined.text)))
        finishes = [piece.finish for pieces in texts for piece in pieces if piece.finish]
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": usage(finishes), **note}

    def first(self, texts: int) -> list[dict[str, Any]]:
        """The chunks before all others, for a number of texts."""
        if self.opening is None:
            return []
        return [self._chunk([self._choice(index, Piece(), self.opening)]) for index in range(texts)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The chunk for one piece of one text."""
        return self._chunk([self._choice(index, piece, self._delta(piece))])

    def last(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The chunk with the token counts, for requests with `include_usage`."""
        return {**self._chunk([]), "usage": usage(finishes)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._base, "object": self.chunk_object, "choices": choices}

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": index,
            **content,
            "logprobs": self._report(piece.tokens) if self._logprobs else None,
            "finish_reason": piece.finish.finish_reason if piece.finish else None,
        }

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return self._message(piece.text)

    def _report(self, tokens: Iterable[tuple[Token, int]]) -> dict[str, Any]:
        pairs = list(tokens)
        return {
            "tokens": [self._spell(token.id) for token, _ in pairs],
            "token_logprobs": [_finite(token.logprob) for token, _ in pairs],
            # the written token is included, even if it is not one of the likeliest
            "top_logprobs": [
                {self._spell(i): _finite(p) for i, p in ((token.id, token.logprob), *token.top)} for token, _ in pairs
            ],
            "text_offset": [offset for _, offset in pairs],
        }

    def _spell(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        return text


class ChatAnswer(Answer):
    """Response format of `/v1/chat/completions`; for the arguments see `Answer`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def _report(self, tokens: Iterable[tuple[Token, int]]) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(i, p) for i, p in token.top]}
                for token, _ in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spell(token)
        # the bytes of an incomplete character are not known
        spelt = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": spelt}


def usage(finishes: Sequence[Finish]) -> dict[str, int]:
    """Token counts over all texts of a request."""
    read, written = (sum(getattr(f, name) for f in finishes) for name in ("prompt_tokens", "completion_tokens"))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event, as text."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
