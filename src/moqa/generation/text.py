"""From tokens to text: whole characters only, and nothing that may become a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_BEFORE = 5  # tokens of the prompt to decode along: some tokenizers drop the space in front of a first token


class Detokenizer:
    """Text of tokens as they come.

    >>> words = Detokenizer(tokenizer, prompt)
    >>> [words.push(token) for token in tokenizer("é!")["input_ids"]]
    ['', 'é', '!']
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_BEFORE:])
        self._fresh: list[int] = []  # those of them whose text was not given out
        self._given = self._decode(self._ids)
        if self._given.endswith(_UNFINISHED):
            self._ids, self._given = [], ""

    def push(self, token: int) -> str:
        """What a further token adds; empty while a character is unfinished."""
        self._ids.append(token)
        self._fresh.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._given) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._given) :]
        # the next token is decoded together with these, and no others, however long the text gets
        self._ids, self._fresh = self._fresh, []
        self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as the decoder writes it."""
        return self._decode(self._ids)[len(self._given) :]

    def _decode(self, ids: list[int]) -> str:
        # cleaning up spaces would change text that was given out already
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Text up to the first stop string, wherever its pieces are cut.

    >>> stops = StopStrings(["\\nuser:"])
    >>> stops.push("Yes.\\nus"), stops.push("er: and")
    (('Yes.', False), ('', True))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be given out, and whether a stop string follows it."""
        if not self._stops:
            return text, False
        self._held += text
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # the first that is complete, and of those the longest: does not depend on where pieces are cut
            _, at = min(hits)
            given, self._held = self._held[:at], ""
            return given, True
        keep = max(self._beginning(stop) for stop in self._stops)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given, False

    def flush(self) -> str:
        """What was held back, at the end."""
        given, self._held = self._held, ""
        return given

    def _beginning(self, stop: str) -> int:
        """Length of the longest beginning of a stop string that the text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
