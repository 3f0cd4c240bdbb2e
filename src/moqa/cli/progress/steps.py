"""How far work is and how fast it gets on, from what it reports."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from moqa.progress import Fact

Clock = Callable[[], float]
PIECES = 8  # the pace is that of the last ones: where pieces differ, they say most about the next
SO_FAR = ("error", "tokens")  # facts of the whole step; the others are gone with their moment


class Step:
    """One step of some work, as it reported it last.

    >>> step = Step("quantize")
    >>> step.update(3, 24, {"layer": 3, "error": 0.0123})
    >>> step.seconds_left is None
    True

    Args:
        name: what is being done.
        clock: seconds.
    """

    def __init__(self, name: str, clock: Clock = time.monotonic) -> None:
        self.name, self.done, self.total = name, 0, 0
        self.facts: dict[str, Fact] = {}
        self.tokens_per_second: float | None = None
        self._clock, self._began = clock, clock()
        self._ended: float | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=PIECES + 1)

    def update(self, done: int, total: int, facts: dict[str, Fact]) -> None:
        """Take a report."""
        now = self._clock()
        if not self._marks or done > self._marks[-1][1]:
            self._marks.append((now, done))
        self.done, self.total = done, total
        self.facts = facts | {name: self.facts[name] for name in SO_FAR if name in self.facts and name not in facts}
        tokens = facts.get("tokens")
        if isinstance(tokens, int | float) and now > self._began:
            self.tokens_per_second = tokens / (now - self._began)

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = self._clock()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._ended is not None

    @property
    def seconds(self) -> float:
        """What it has taken so far."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def seconds_left(self) -> float | None:
        """What it should still take, by the pace of its last pieces; None before two of them were measured."""
        if self.done >= self.total:
            return 0.0
        if len(self._marks) < 3:
            return None
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        pace = (last - first) / (done - before)
        # one that takes longer than the others did may end at any moment, and the others are still to come
        rest_of_piece = max(0.0, pace - (self._clock() - last))
        return rest_of_piece + pace * (self.total - done - 1)


class View(Protocol):
    """What shows steps."""

    def show(self, step: Step, /) -> None:
        """A step has reported; it is a new one if it is not the one of the last call."""

    def end(self, step: Step, /) -> None:
        """A step is over."""


class Steps:
    """The `Report` that makes steps of what it is called with, and shows them.

    >>> report = Steps([Lines()])
    >>> report("quantize", 0, 24)
    moqa: quantize

    Args:
        views: what shows them.
        clock: seconds.
    """

    def __init__(self, views: Sequence[View], clock: Clock = time.monotonic) -> None:
        self._views, self._clock = views, clock
        self._step: Step | None = None

    def __call__(self, step: str, done: int, total: int, **facts: Fact) -> None:
        """Take a report, and show the step that it is of."""
        current = self._step
        if current is None or step != current.name or done < current.done:
            self.end()
            current = self._step = Step(step, self._clock)
        current.update(done, total, facts)
        for view in self._views:
            view.show(current)
        if done >= total:
            self.end()

    def end(self) -> None:
        """All that was begun is over."""
        if self._step is None or self._step.over:
            return
        self._step.end()
        for view in self._views:
            view.end(self._step)
