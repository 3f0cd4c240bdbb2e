"""Responses in OpenAI's two formats, complete or as chunks of a stream."""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moqa.generation import Finish, Piece, Token
from moqa.serve.said import AnswerReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class Answer:
    """Response format of `/v1/completions`.

    Args:
        model: name of the model.
        tokenizer: turns the tokens of log-probabilities into text.
        logprobs: whether log-probabilities are requested.
        copies: texts that were written for each prompt.
        choices: how many of them are returned, the likeliest first if not all.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    opening: ClassVar[dict[str, Any] | None] = None

    def __init__(
        self, model: str, tokenizer: "PreTrainedTokenizerBase", logprobs: bool, copies: int = 1, choices: int = 1
    ) -> None:
        self._tokenizer, self._logprobs, self._copies, self._choices = tokenizer, logprobs, copies, choices
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Sequence[Piece]], note: Mapping[str, Any]) -> dict[str, Any]:
        """The complete response to a request.

        Args:
            texts: all pieces of each text, those of one prompt after another.
            note: further fields in addition to the usage.
        """
        returned = list(texts)
        if self._choices < self._copies:
            prompts = [texts[start : start + self._copies] for start in range(0, len(texts), self._copies)]
            returned = [one for copies in prompts for one in sorted(copies, key=_surprise)[: self._choices]]
        choices = []
        for index, pieces in enumerate(returned):
            tokens = [pair for piece in pieces for pair in piece.tokens]
            joined = Piece("".join(piece.text for piece in pieces), tuple(tokens), finish=pieces[-1].finish)
            choices.append(self._choice(index, joined, *self._message(joined.text)))
        finishes = [piece.finish for pieces in texts for piece in pieces if piece.finish]
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": self._usage(finishes), **note}

    def first(self, texts: int) -> list[dict[str, Any]]:
        """The chunks before all others, for a number of texts."""
        if self.opening is None:
            return []
        return [self._chunk([self._choice(index, Piece(), self.opening, False)]) for index in range(texts)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The chunk for one piece of one text."""
        return self._chunk([self._choice(index, piece, *self._delta(index, piece))])

    def last(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The chunk with the token counts, for requests with `include_usage`."""
        return {**self._chunk([]), "usage": self._usage(finishes)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._base, "object": self.chunk_object, "choices": choices}

    def _usage(self, finishes: Sequence[Finish]) -> dict[str, int]:
        """Token counts over all texts of a request; a prompt counts once, however many texts it got."""
        read = sum(finish.prompt_tokens for finish in finishes) // self._copies
        written = sum(finish.completion_tokens for finish in finishes)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int, piece: Piece, content: dict[str, Any], calls: bool) -> dict[str, Any]:
        reason = piece.finish.finish_reason if piece.finish else None
        return {
            "index": index,
            **content,
            "logprobs": self._report(piece.tokens) if self._logprobs else None,
            "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
        }

    def _message(self, text: str) -> tuple[dict[str, Any], bool]:
        """Content of a choice, and whether it has calls of tools."""
        return {"text": text}, False

    def _delta(self, index: int, piece: Piece) -> tuple[dict[str, Any], bool]:  # noqa: ARG002
        """The same for one piece of a text."""
        return self._message(piece.text)

    def _report(self, tokens: Iterable[tuple[Token, int]]) -> dict[str, Any]:
        pairs = list(tokens)
        return {
            "tokens": [self._spell(token.id) for token, _ in pairs],
            "token_logprobs": [_finite(token.logprob) for token, _ in pairs],
            "top_logprobs": [self._likeliest(token) for token, _ in pairs],
            "text_offset": [offset for _, offset in pairs],
        }

    def _likeliest(self, token: Token) -> dict[str, float | None] | None:
        """The written token is included; of tokens that are spelt alike, the likeliest counts."""
        if token.logprob is None:
            return None
        pairs = sorted(((token.id, token.logprob), *token.top), key=lambda pair: pair[1])
        return {self._spell(i): _finite(p) for i, p in pairs}

    def _spell(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        return text


class ChatAnswer(Answer):
    """Response format of `/v1/chat/completions`.

    Args:
        reader: makes what reads the calls of tools out of a text; None if there are none.
        most_calls: how many calls are returned; None for all.
        others: see `Answer`.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}

    def __init__(
        self,
        *args: Any,
        reader: Callable[[], AnswerReader] = AnswerReader,
        most_calls: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(*args, **others)
        self._new_turn = lambda: _Turn(reader(), most_calls)
        self._streamed: dict[int, _Turn] = defaultdict(self._new_turn)

    def _message(self, text: str) -> tuple[dict[str, Any], bool]:
        turn = self._new_turn()
        fields = turn.fields(text, ends=True)
        if turn.called and not fields.get("content", "").strip():
            fields["content"] = None
        for call in fields.get("tool_calls", []):
            del call["index"]
        return {"message": {"role": "assistant", "content": "", "refusal": None, **fields}}, turn.called > 0

    def _delta(self, index: int, piece: Piece) -> tuple[dict[str, Any], bool]:
        turn = self._streamed[index]
        return {"delta": turn.fields(piece.text, ends=piece.finish is not None)}, turn.called > 0

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


class _Turn:
    """One answer of a conversation, as far as it was read."""

    def __init__(self, reader: AnswerReader, most_calls: int | None) -> None:
        self._reader, self._most = reader, most_calls
        self.called = 0

    def fields(self, text: str, ends: bool) -> dict[str, Any]:
        """What another piece of text adds to the message."""
        said = self._reader.push(text)
        if ends:
            said += self._reader.end()
        calls = said.calls if self._most is None else said.calls[: self._most - self.called]
        told = [
            {"index": index, "id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": call.arguments}}
            for index, call in enumerate(calls, self.called)
        ]  # fmt: skip
        self.called += len(told)
        named = {"content": said.content, "reasoning_content": said.reasoning, "tool_calls": told}
        return {name: value for name, value in named.items() if value}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event, as text."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"


def _surprise(pieces: Sequence[Piece]) -> float:
    """Mean of the written tokens' negative log-probabilities."""
    values = [token.logprob or 0.0 for piece in pieces if piece.completion_tokens for token, _ in piece.tokens]
    return -sum(values) / max(len(values), 1)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
