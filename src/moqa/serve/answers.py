"""Answers in OpenAI's two shapes, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moqa.generation import Finish, Piece, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0  # JSON has no infinity


class Answer:
    """Shape of `/v1/completions`.

    Args:
        model: its name.
        tokenizer: spells the tokens of log-probabilities.
        logprobs: whether they are asked for.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    opening: ClassVar[dict[str, Any] | None] = None

    def __init__(self, model: str, tokenizer: "PreTrainedTokenizerBase", logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Sequence[Piece]], note: Mapping[str, Any]) -> dict[str, Any]:
        """One answer for all that was asked.

        Args:
            texts: pieces of each text, up to its end.
            note: further fields beside the usage.
        """
        choices = []
        for index, pieces in enumerate(texts):
            tokens = [pair for piece in pieces for pair in piece.tokens]
            joined = Piece("".join(piece.text for piece in pieces), tuple(tokens), finish=pieces[-1].finish)
            choices.append(self._choice(index, joined, self._message(joined.text)))
        finishes = [piece.finish for pieces in texts for piece in pieces if piece.finish]
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": usage(finishes), **note}

    def first(self, texts: int) -> list[dict[str, Any]]:
        """Chunks before all others, for some number of texts."""
        if self.opening is None:
            return []
        return [self._chunk([self._choice(index, Piece(), self.opening)]) for index in range(texts)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One piece of one text."""
        return self._chunk([self._choice(index, piece, self._delta(piece))])

    def last(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The chunk with the token counts, for those who want it."""
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
        found = list(tokens)
        return {
            "tokens": [self._spell(token.id) for token, _ in found],
            "token_logprobs": [_finite(token.logprob) for token, _ in found],
            # the token written is among them, even if it is not one of the likeliest
            "top_logprobs": [
                {self._spell(i): _finite(p) for i, p in ((token.id, token.logprob), *token.top)} for token, _ in found
            ],
            "text_offset": [offset for _, offset in found],
        }

    def _spell(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        return text


class ChatAnswer(Answer):
    """Shape of `/v1/chat/completions`; for the arguments see `Answer`."""

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
        # the bytes of a part of a character are not known
        spelt = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": spelt}


def usage(finishes: Sequence[Finish]) -> dict[str, int]:
    """Token counts over all texts of a request."""
    read, written = (sum(getattr(f, name) for f in finishes) for name in ("prompt_tokens", "completion_tokens"))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
