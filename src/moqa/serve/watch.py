"""The recent text of one client: kept only in memory, and it decides which adjustment the requests get."""

import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

import numpy as np

from moqa.adjustment.drift import DriftDetector
from moqa.serve.kept import MadeAdjustment
from moqa.serve.text import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_KEPT = 4
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


class Watch:
    """Decides which adjustment the requests of one client get that name none.

    >>> from moqa.format.routing import read_routing
    >>> watch = Watch(DriftDetector(read_routing("runs/out", plan.fingerprint)), Collected(tokenizer, 4096))
    >>> watch.decide()
    >>> watch.default.name, watch.lacks_one
    (None, False)

    Args:
        detector: detects whether text is known or novel.
        collected: recent novel text; cleared once an adjustment fits it.

    Attributes:
        kept: adjustments that were made for this client, by name; the most recently used one is last.
        default: adjustment for requests that name none.
        lacks_one: whether recent text is novel and no adjustment fits it.
        used: when the client's last token was counted.
        begun: when its last adjustment was begun.
    """

    def __init__(self, detector: DriftDetector, collected: Collected) -> None:
        self.detector, self.collected = detector, collected
        self.kept: OrderedDict[str, MadeAdjustment] = OrderedDict()
        self.default, self.lacks_one = Chosen(), False
        self.used, self.begun = time.monotonic(), 0.0
        self._number = 0

    def count(self, counts: np.ndarray) -> None:
        """Add the routing of further tokens.

        Args:
            counts: [layers, experts] number of tokens routed to each expert.
        """
        self.used = time.monotonic()
        judged = self.detector.judgements
        self.collected.count(counts)
        self.detector.add(counts)
        if self.detector.judgements > judged:
            self.decide()

    def decide(self) -> None:
        """Choose the default from now on."""
        self.lacks_one = False
        if self.detector.state == "known":
            self.collected.clear()
            self.default = Chosen()
        elif self.detector.state == "novel":
            distance = self.detector.distance
            fitting = min(self.kept.values(), key=lambda made: distance(made.shares), default=None)
            if fitting is None or distance(fitting.shares) >= self.detector.threshold:
                self.default, self.lacks_one = Chosen(), True
                return
            self.collected.clear()
            if self.default.made is not fitting:
                self.default = Chosen(fitting.name, made=fitting)
                self.kept.move_to_end(fitting.name)

    def keep(self, made: MadeAdjustment) -> None:
        """Keep an adjustment that was made, in place of the least recently used one if there are `MAX_KEPT`."""
        self.kept[made.name] = made
        if len(self.kept) > MAX_KEPT:
            self.kept.popitem(last=False)
        self.decide()

    def begin(self, held: str) -> tuple[MadeAdjustment, list[str]]:
        """An adjustment to be made, and the texts to make it of, which are forgotten.

        Args:
            held: a name for it in the model.
        """
        self._number += 1
        self.begun = time.monotonic()
        made, texts = MadeAdjustment(f"auto-{self._number}", held, self.collected.shares), self.collected.texts()
        self.collected.clear()
        return made, texts
