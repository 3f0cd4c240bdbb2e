"""Text from tokens: only whole characters, and nothing that may become a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # replacement character: the bytes are not a complete character
_BEFORE = 5  # tokens of the prompt to decode as well: some tokenizers drop the space before the first token


class Detokenizer:
    """Turns a stream of tokens into text.

    >>> words = Detokenizer(tokenizer)
    >>> [words.push(token) for token in tokenizer("日!")["input_ids"]]
    ['', '', '日', '!']
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = list(prompt[-_BEFORE:])
        self._fresh: list[int] = []  # those of them whose text was not returned yet
        self._given = self._decode(self._ids)
        if self._given.endswith(_UNFINISHED):
            self._ids, self._given = [], ""

    def push(self, token: int) -> str:
        """Text that another token adds; empty while a character is incomplete."""
        self._ids.append(token)
        self._fresh.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._given) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._given) :]
        # the next token is decoded together with only these, however long the text gets
        self._ids, self._fresh = self._fresh, []
        self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """Remaining text at the end: an incomplete character, as the decoder writes it."""
        return self._decode(self._ids)[len(self._given) :]

    def _decode(self, ids: list[int]) -> str:
        # cleaning up spaces would change text that was already returned
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Cuts a text at the first stop string, even if the string is split over several pieces.

    >>> stops = StopStrings(["\\nuser:"])
    >>> stops.push("Yes.\\nus"), stops.push("er: and")
    (('Yes.', False), ('', True))

    Attributes:
        rest: text from the stop string on, once there was one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = self.rest = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can be returned, and whether a stop string follows it."""
        if not self._stops:
            return text, False
        self._held += text
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # the stop string that is complete first, the longest of several: independent of where pieces are split
            _, at = min(hits)
            given, self.rest, self._held = self._held[:at], self._held[at:], ""
            return given, True
        keep = max(self._beginning(stop) for stop in self._stops)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given, False

    def flush(self) -> str:
        """Remaining text at the end."""
        given, self._held = self._held, ""
        return given

    def _beginning(self, stop: str) -> int:
        """Length of the longest prefix of a stop string that is a suffix of the text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
