"""How long a training lasts, as users say it: a time, or a number of steps."""

import re
from dataclasses import dataclass

from moqa.errors import MoqaError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class TrainingLength:
    """A number of steps, or a time whose number of steps is known once some were timed.

    >>> TrainingLength.parse("15m").seconds, TrainingLength.parse("300").steps
    (900.0, 300)
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> "TrainingLength":
        """A length as users type it.

        Raises:
            MoqaError: if it is neither a time nor a number of steps.
        """
        found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([smh]?)\s*", str(text))
        if found and found[2] and float(found[1]):
            return cls(seconds=float(found[1]) * _SECONDS[found[2]])
        if found and found[1].isdigit() and int(found[1]):
            return cls(steps=int(found[1]))
        raise MoqaError(
            f"{text} is not the length of a training", "give a time such as 15m or 1h, or steps such as 300"
        )

    def count(self, seconds: float) -> int:
        """Steps of a training whose steps take so many seconds."""
        return self.steps if self.steps is not None else max(1, int((self.seconds or 0) / seconds))
