"""Recent texts of clients: kept only in memory, and no more than an adjustment needs."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 1024  # tokens after which a part of an unfinished text is collected


class Collected:
    """The latest texts as tokens, up to a limit, and the routing of their tokens.

    Args:
        tokenizer: turns the tokens back into text.
        limit: largest number of tokens to keep.

    Attributes:
        tokens: number of tokens kept.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._texts: deque[list[int]] = deque()
        self.tokens = 0
        self._counts: np.ndarray = np.zeros((1, 1))

    @property
    def shares(self) -> np.ndarray:
        """[layers, experts] share of the tokens routed to each expert since the last `clear`."""
        return self._counts / np.maximum(self._counts.sum(1, keepdims=True), 1)

    def count(self, counts: np.ndarray) -> None:
        """Add the routing of further tokens.

        Args:
            counts: [layers, experts] number of tokens routed to each expert.
        """
        self._counts = self._counts + counts

    def take(self, text: list[int], last: bool) -> None:
        """Move the tokens of a text into this collection once there are enough of them, or the text has ended.

        Args:
            text: tokens that were not collected yet; emptied if they are taken.
            last: whether the text has ended.
        """
        if len(text) < PART and not last:
            return
        part = text[-self._limit :]
        text.clear()
        if part:
            self._texts.append(part)
            self.tokens += len(part)
        while self.tokens > self._limit:
            self.tokens -= len(self._texts.popleft())

    def texts(self) -> list[str]:
        """The collected texts, decoded."""
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in self._texts]

    def clear(self) -> None:
        """Discard everything."""
        self._texts.clear()
        self.tokens = 0
        self._counts = np.zeros((1, 1))
