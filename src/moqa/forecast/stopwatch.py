"""A stopwatch for trials: how long work takes once it has been done before, and how much longer at first."""

import time
from collections.abc import Callable
from statistics import fmean

# A first time finds cold caches, and products that are not compiled yet: tenths of a second at most. What takes longer
# than that several times over is done once; what is shorter, until the mean of some says more than one does.
_LONG, _ENOUGH, _MOST = 1.0, 0.2, 4


class Stopwatch:
    """Times pieces of work.

    >>> watch = Stopwatch()
    >>> watch.seconds(lambda: quantize_piece(site, piece))
    0.0214

    Args:
        clock: seconds since some moment.
        work: seconds that all cores have worked since some moment.

    Attributes:
        once: what first times took more than later ones, in all.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, work: Callable[[], float] = time.process_time
    ) -> None:
        self.clock, self._work, self.once = clock, work, 0.0

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of work that can be done again, not those that only its first time takes."""
        first, _ = self.single(work)
        if first >= _LONG:
            return first
        # the mean, not the least: nothing that takes hours is done at the best speed
        took = [self.single(work)[0]]
        while len(took) < _MOST and sum(took) < _ENOUGH:
            took.append(self.single(work)[0])
        again = fmean(took)
        self.once += max(first - again, 0.0)
        return again

    def single(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds of work that is done once, and how long cores worked for it."""
        began, busy = self.clock(), self._work()
        work()
        return self.clock() - began, self._work() - busy
