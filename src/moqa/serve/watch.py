"""What recent text is, and which of the adjustments that were made it gets."""

import numpy as np

from moqa.adjustment.drift import DriftDetector
from moqa.serve.collected import Collected
from moqa.serve.kept import KeptAdjustments
from moqa.serve.text import Chosen


class Watch:
    """Decides which adjustment requests get that ask for none.

    >>> watch.count(counts)
    True
    >>> watch.default.name
    'auto-1'

    Args:
        detector: says whether text is known or novel.
        collected: recent novel text; cleared when an adjustment fits it.
        kept: adjustments that were made.

    Attributes:
        default: what requests get.
        lacks_one: whether recent text is novel and no adjustment fits it.
    """

    def __init__(self, detector: DriftDetector, collected: Collected, kept: KeptAdjustments) -> None:
        self._detector, self._collected, self._kept = detector, collected, kept
        self.default, self.lacks_one = Chosen(), False

    def count(self, counts: np.ndarray) -> bool:
        """Note how further tokens were routed; whether that led to a decision.

        Args:
            counts: [layers, experts] how many of them each expert got.
        """
        judged = self._detector.judgements
        self._collected.count(counts)
        self._detector.add(counts)
        if self._detector.judgements == judged:
            return False
        self.decide()
        return True

    def decide(self) -> None:
        """Choose what requests get from now on."""
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
