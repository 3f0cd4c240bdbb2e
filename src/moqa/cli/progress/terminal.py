"""The live view of a terminal."""

import sys

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moqa.cli.progress.steps import Step
from moqa.cli.progress.words import facts, gib, memory, span

BAR = 8  # characters


class Terminal:
    """One line per step, renewed while it runs; all of it is wiped off at the end.

    >>> with Terminal(console) as view:
    ...     view.show(step)

    Args:
        console: of the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._steps: dict[str, Step] = {}
        # What is printed meanwhile goes above the view; but a result for a pipe must get there, and not to stderr.
        self._live = Live(
            get_renderable=self._table, console=console, transient=True, redirect_stdout=sys.stdout.isatty()
        )

    def __enter__(self) -> "Terminal":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, step: Step) -> None:
        """Give it a line: that of its name, if it comes again."""
        self._steps[step.name] = step

    def end(self, step: Step) -> None:
        """Its line stays."""

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("step", "", "done"):
            table.add_column(heading, no_wrap=True)
        # on a narrow terminal this one gives way
        table.add_column("")
        for heading in ("GiB (peak)", "time", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        now, peak = memory()
        # in the thread that renews the view, while work may add steps
        for step in list(self._steps.values()):
            left = None if step.over else step.seconds_left
            table.add_row(
                Text(step.name),
                ProgressBar(step.total, step.total if step.over else step.done, width=BAR),
                f"{step.done}/{step.total}",
                Text(" ".join(facts(step)), no_wrap=True, overflow="ellipsis"),
                "" if step.over else f"{gib(now)} ({gib(peak)})",
                span(step.seconds),
                "" if left is None else span(left),
            )
        return table
