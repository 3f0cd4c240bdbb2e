"""The live view on a terminal."""

import sys

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moqa.cli.progress.steps import Step
from moqa.cli.progress.words import facts, gib, memory, span

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
        now, peak = memory()
        # runs in the thread that updates the view, while work may add steps
        for step in list(self._steps.values()):
            left = None if step.over else step.seconds_left
            table.add_row(
                Text(step.name),
                ProgressBar(step.total, step.total if step.over else step.done, width=BAR_WIDTH),
                f"{step.done}/{step.total}",
                Text(" ".join(facts(step)), no_wrap=True, overflow="ellipsis"),
                "" if step.over else f"{gib(now)} ({gib(peak)})",
                span(step.seconds),
                "" if left is None else span(left),
            )
        return table
