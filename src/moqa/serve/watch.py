"""Decides from the recent text of one client which adjustment its requests get."""

import time

import numpy as np

from moqa.adjustment.drift import DriftDetector
from moqa.serve.collected import Collected
from moqa.serve.kept import KeptAdjustments, MadeAdjustment
from moqa.serve.text import Chosen


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
        kept: adjustments that were made for this client.
        default: adjustment for requests that name none.
        lacks_one: whether recent text is novel and no adjustment fits it.
        used: when the client's last token was counted.
        begun: when its last adjustment was begun.
    """

    def __init__(self, detector: DriftDetector, collected: Collected) -> None:
        self.detector, self.collected, self.kept = detector, collected, KeptAdjustments()
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
            fitting = self.kept.nearest(self.detector.distance)
            if fitting is None or self.detector.distance(fitting.shares) >= self.detector.threshold:
                self.default, self.lacks_one = Chosen(), True
                return
            self.collected.clear()
            if self.default.made is not fitting:
                self.default = Chosen(fitting.name, made=fitting)
                self.kept.use(fitting)

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
