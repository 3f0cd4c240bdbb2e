"""Who rounds while it trains, before the first round: a knapsack with two capacities, seconds and bytes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqa.errors import MoqaError
from moqa.planning.solver import solve


@dataclass(frozen=True)
class Limits:
    """Of a round.

    Attributes:
        seconds: deadline; None for the one with the most progress per second.
        bytes: of all messages; None for no limit.
    """

    seconds: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class ModeOptions:
    """What clients can do, and what each choice is expected to bring and to take.

    >>> options = ModeOptions(np.array([[0.2, 0.5]]), np.array([[1.0, 2.0]]), np.array([[100, 100]]))
    >>> options.choose(Limits(seconds=2.0))
    array([1])

    Attributes:
        gains: [clients, modes] progress in one round, in any unit.
        seconds: [clients, modes] of one round, with both messages.
        sizes: [clients, modes] bytes of both messages, int64.
    """

    gains: NDArray[np.float64]
    seconds: NDArray[np.float64]
    sizes: NDArray[np.int64]

    def choose(self, limits: Limits) -> NDArray[np.int64]:
        """The modes that bring most within a deadline and a number of bytes.

        Seconds of clients are not added up: they work at the same time, so the deadline is each one's own, and a client
        that can keep it in no mode has its fastest. Bytes are those of all.

        Raises:
            MoqaError: if even the smallest messages exceed the bytes.
        """
        deadline = self.deadline() if limits.seconds is None else limits.seconds
        fastest = self.seconds == self.seconds.min(1, keepdims=True)
        costs = np.where((self.seconds <= deadline) | fastest, self.gains.max(1, keepdims=True) - self.gains, np.inf)
        limit = int(self.sizes.max(1).sum()) if limits.bytes is None else limits.bytes
        try:
            return solve(costs[None], self.sizes, limit).choice
        except ValueError:
            least = int(np.where(np.isfinite(costs), self.sizes, np.iinfo(np.int64).max).min(1).sum())
            raise MoqaError(f"{limit:,} bytes a round are too few", f"at least {least:,} are needed") from None

    def deadline(self) -> float:
        """The deadline with the most progress per second.

        >>> ModeOptions(np.array([[2, 3], [2, 3]]), np.array([[1, 2], [3, 9]]), np.ones((2, 2), np.int64)).deadline()
        3.0
        """
        ends = np.unique(self.seconds[self.seconds >= self.seconds.min(1).max()]).tolist()
        return float(max(ends, key=self.rate))

    def rate(self, deadline: float) -> float:
        """Progress per second with a deadline, or with the shortest that all clients can keep.

        >>> ModeOptions(np.array([[2, 3]]), np.array([[1, 2]]), np.ones((1, 2), np.int64)).rate(2.0)
        1.5
        """
        end = max(deadline, float(self.seconds.min(1).max()))
        return float(np.where(self.seconds <= end, self.gains, 0.0).max(1).sum() / end)
