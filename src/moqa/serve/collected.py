"""Recent texts of clients: in memory only, and no more of them than an adjustment needs."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 1024  # tokens after which a text that goes on is taken


class Collected:
    """Texts as tokens, the latest ones up to a limit, and how their tokens were routed.

    Args:
        tokenizer: to spell them.
        limit: tokens to keep at most.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._texts: deque[list[int]] = deque()
        self._tokens = 0
        self._counts: np.ndarray = np.zeros((1, 1))

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self._tokens

    @property
    def shares(self) -> np.ndarray:
        """[layers, experts] share of the routed tokens since the last `clear` that each expert got."""
        return self._counts / np.maximum(self._counts.sum(1, keepdims=True), 1)

    def count(self, counts: np.ndarray) -> None:
        """Note how further tokens were routed.

        Args:
            counts: [layers, experts] how many of them each expert got.
        """
        self._counts = self._counts + counts

    def take(self, text: list[int], last: bool) -> None:
        """Take over the tokens of a text once they are many, or nothing follows; the list is empty then.

        Args:
            text: tokens that were not taken before.
            last: whether the text is at its end.
        """
        if len(text) < PART and not last:
            return
        part = text[-self._limit :]
        text.clear()
        if part:
            self._texts.append(part)
            self._tokens += len(part)
        while self._tokens > self._limit:
            self._tokens -= len(self._texts.popleft())

    def texts(self) -> list[str]:
        """All of them, spelt."""
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in self._texts]

    def clear(self) -> None:
        """Forget everything."""
        self._texts.clear()
        self._tokens = 0
        self._counts = np.zeros((1, 1))
