"""Displays of steps: a live view on a terminal, plain lines elsewhere, and the words of both."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moqa.cli.progress.steps import Clock, Step
from moqa.errors import printable
from moqa.memory.process import used

INTERVAL = 10.0  # seconds between two lines of a step
BAR_WIDTH = 8  # characters


class Terminal:
    """One line per step, updated while it runs; the view is erased at the end.

    >>> with Terminal(Console(stderr=True)) as view:
    ...     view.show(Step("quantize"))

    Args:
        console: console of the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._steps: dict[str, Step] = {}
        # Output printed meanwhile appears above the view, but a result for a pipe must go to stdout, not to stderr.
        self._live = Live(
            get_renderable=self._table, console=console, transient=True, redirect_stdout=sys.stdout.isatty()
        )

    def __enter__(self) -> "Terminal":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, step: Step) -> None:
        """Show a step; it replaces an earlier one of the same name."""
        self._steps[step.name] = step

    def end(self, step: Step) -> None:
        """Nothing to do: the line of the step stays."""

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("step", "", "done"):
            table.add_column(heading, no_wrap=True)
        # this column is shortened on a narrow terminal
        table.add_column("")
        for heading in ("GiB (peak)", "time", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        now, peak = used()
        # runs in the thread that updates the view, while work may add steps
        for step in list(self._steps.values()):
            left = None if step.over else step.seconds_left
            # what has no pieces moves without a share
            whole = step.total or (1 if step.over else None)
            table.add_row(
                Text(step.name),
                ProgressBar(whole, whole or 0 if step.over else step.done, width=BAR_WIDTH),
                f"{step.done}/{step.total}" if step.total else "",
                Text(printable(" ".join(facts(step))), no_wrap=True, overflow="ellipsis"),
                "" if step.over else f"{gib(now)} ({gib(peak)})",
                span(step.seconds),
                "" if left is None or not step.total else span(left),
            )
        return table


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


def facts(step: Step) -> list[str]:
    """The facts of a step; tokens are shown as tokens per second.

    >>> step = Step("quantize")
    >>> step.update(3, 24, {"layer": 3, "expert": 17, "experts": 64, "error": 0.0123})
    >>> facts(step)
    ['layer 3', 'expert 17/64', 'error 0.0123']
    """
    known = {name: value for name, value in step.facts.items() if name != "tokens"}
    if "expert" in known and "experts" in known:
        known["expert"] = f"{known['expert']}/{known.pop('experts')}"
    words = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items()]
    return words if step.tokens_per_second is None else [*words, f"{step.tokens_per_second:.0f} tokens/s"]


def span(seconds: float) -> str:
    """A duration as minutes and seconds, or hours, minutes and seconds.

    >>> span(62.3), span(3662)
    ('01:02', '1:01:02')
    """
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


def gib(size: int | None) -> str:
    """Bytes in GiB, without the unit.

    >>> gib(700_000_000), gib(None)
    ('0.65', '-')
    """
    return "-" if size is None else f"{size / 2**30:.2f}"


def _told(step: Step) -> str:
    now, peak = used()
    return ", ".join([f"{step.name} {step.done}/{step.total}", *facts(step), f"{gib(now)} GiB (peak {gib(peak)})"])


def _write(text: str) -> None:
    print(f"moqa: {printable(text)}", file=sys.stderr, flush=True)
