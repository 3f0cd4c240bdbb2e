"""Plain lines on stderr, for when it is not a terminal."""

import sys
import time

from moqa.cli.progress.steps import Clock, Step
from moqa.cli.progress.words import facts, gib, memory, span

INTERVAL = 10.0  # seconds between two lines of a step


class Lines:
    """A line when a step begins, one every ten seconds while it reports, and one when it ends.

    >>> Lines().show(Step("quantize"))  # writes "moqa: quantize"

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._step: Step | None = None
        self._last = 0.0

    def show(self, step: Step) -> None:
        """Print a line for a new step, or if the last line is old enough."""
        now = self._clock()
        if step is not self._step:
            _write(step.name)
        elif now - self._last >= INTERVAL and step.done < step.total:
            left = "" if step.seconds_left is None else f", {span(step.seconds_left)} left"
            _write(f"{_told(step)}, {span(step.seconds)} so far{left}")
        else:
            return
        self._step, self._last = step, now

    def end(self, step: Step) -> None:
        """Print the result of the step and its time."""
        _write(f"{_told(step)}, took {span(step.seconds)}")


def _told(step: Step) -> str:
    now, peak = memory()
    return ", ".join([f"{step.name} {step.done}/{step.total}", *facts(step), f"{gib(now)} GiB (peak {gib(peak)})"])


def _write(text: str) -> None:
    print(f"moqa: {text}", file=sys.stderr, flush=True)
