"""Decides from recent text which adjustment is the default."""

import numpy as np

from moqa.adjustment.drift import DriftDetector
from moqa.serve.collected import Collected
from moqa.serve.kept import KeptAdjustments
from moqa.serve.text import Chosen


class Watch:
    """Decides which adjustment requests get that name none.

    >>> from moqa.format.routing import read_routing
    >>> detector = DriftDetector(read_routing("runs/out", plan.fingerprint))
    >>> watch = Watch(detector, Collected(tokenizer, 4096), KeptAdjustments(model.adjustments))
    >>> watch.decide()
    >>> watch.default.name, watch.lacks_one
    (None, False)

    Args:
        detector: detects whether text is known or novel.
        collected: recent novel text; cleared once an adjustment fits it.
        kept: adjustments that were made.

    Attributes:
        default: adjustment for requests that name none.
        lacks_one: whether recent text is novel and no adjustment fits it.
    """

    def __init__(self, detector: DriftDetector, collected: Collected, kept: KeptAdjustments) -> None:
        self._detector, self._collected, self._kept = detector, collected, kept
        self.default, self.lacks_one = Chosen(), False

    def count(self, counts: np.ndarray) -> bool:
        """Add the routing of further tokens; returns whether it led to a decision.

        Args:
            counts: [layers, experts] number of tokens routed to each expert.
        """
        judged = self._detector.judgements
        self._collected.count(counts)
        self._detector.add(counts)
        if self._detector.judgements == judged:
            return False
        self.decide()
        return True

    def decide(self) -> None:
        """Choose the default from now on."""
        self.lacks_one = False
        if self._detector.state == "known":
            self._collected.clear()
            self.default = Chosen()
        elif self._detector.state == "novel":
            fitting = self._kept.nearest(self._detector.distance)
            if fitting is None or self._detector.distance(fitting.shares) >= self._detector.threshold:
                self.default, self.lacks_one = Chosen(), True
                return
            self._collected.clear()
            if self.default.keeps is not fitting:
                self.default = Chosen(fitting.name, keeps=fitting)
                self._kept.use(fitting)
