"""Progress and speed of work, computed from its reports."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from moqa.progress import Fact

Clock = Callable[[], float]
PACE_PIECES = 8  # the pace is that of the last pieces: where pieces differ, these predict the next ones best
KEPT_FACTS = ("error", "tokens")  # facts about the step so far, kept until reported again; others apply once


class Step:
    """One step of some work, with its last report.

    >>> step = Step("quantize")
    >>> step.update(3, 24, {"layer": 3, "error": 0.0123})
    >>> step.seconds_left is None
    True

    Args:
        name: name of the step.
        clock: seconds.
    """

    def __init__(self, name: str, clock: Clock = time.monotonic) -> None:
        self.name, self.done, self.total = name, 0, 0
        self.facts: dict[str, Fact] = {}
        self.tokens_per_second: float | None = None
        self._clock, self._began = clock, clock()
        self._ended: float | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=PACE_PIECES + 1)

    def update(self, done: int, total: int, facts: dict[str, Fact]) -> None:
        """Take over a report."""
        now = self._clock()
        if not self._marks or done > self._marks[-1][1]:
            self._marks.append((now, done))
        self.done, self.total = done, total
        self.facts = facts | {name: self.facts[name] for name in KEPT_FACTS if name in self.facts and name not in facts}
        tokens = facts.get("tokens")
        if isinstance(tokens, int | float) and now > self._began:
            self.tokens_per_second = tokens / (now - self._began)

    def end(self) -> None:
        """Mark the step as ended."""
        self._ended = self._clock()

    @property
    def over(self) -> bool:
        """Whether the step has ended."""
        return self._ended is not None

    @property
    def seconds(self) -> float:
        """Time since the step began, or all of its time if it has ended."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def seconds_left(self) -> float | None:
        """Expected remaining time, by the pace of the last pieces; None before two pieces were measured."""
        if self.done >= self.total:
            return 0.0
        if len(self._marks) < 3:
            return None
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        pace = (last - first) / (done - before)
        # a piece that already takes longer than the pace is expected to end now
        rest_of_piece = max(0.0, pace - (self._clock() - last))
        return rest_of_piece + pace * (self.total - done - 1)


class View(Protocol):
    """A display of steps."""

    def show(self, step: Step, /) -> None:
        """Show a step that has reported; a step other than that of the last call is new."""

    def end(self, step: Step, /) -> None:
        """Show that a step has ended."""


class Steps:
    """A `Report` that collects reports into steps and shows them.

    >>> from moqa.cli.progress.views import Lines
    >>> report = Steps([Lines()])
    >>> report("quantize", 0, 24)  # writes "moqa: quantize" to stderr

    Args:
        views: displays of the steps.
        clock: seconds.
    """

    def __init__(self, views: Sequence[View], clock: Clock = time.monotonic) -> None:
        self._views, self._clock = views, clock
        self._step: Step | None = None

    def __call__(self, step: str, done: int, total: int, **facts: Fact) -> None:
        """Take a report and show its step."""
        current = self._step
        if current is None or step != current.name or done < current.done:
            self.end()
            current = self._step = Step(step, self._clock)
        current.update(done, total, facts)
        for view in self._views:
            view.show(current)
        if done >= total:
            self.end()

    def begin(self, view: View) -> None:
        """Show that work goes on before its first report: opening a model and reading texts may take long."""
        self._step = Step("start", self._clock)
        view.show(self._step)

    def end(self) -> None:
        """End the current step, if any."""
        if self._step is None or self._step.over:
            return
        self._step.end()
        for view in self._views:
            view.end(self._step)
