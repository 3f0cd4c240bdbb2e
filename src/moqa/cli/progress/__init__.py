"""Progress of long work: a live view or plain lines on stderr, and a JSON log."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from moqa.cli.common import console
from moqa.cli.progress.log import Log, LogOption, logged
from moqa.cli.progress.steps import Steps, View
from moqa.cli.progress.views import Lines, Terminal
from moqa.progress import Report

__all__ = ["Log", "LogOption", "logged", "progress"]


@contextmanager
def progress(log: Log | None = None) -> Iterator[Report]:
    """Show the progress of a `with` block: live on a terminal, as plain lines elsewhere, and in a log if given.

    >>> with progress() as report:
    ...     report("quantize", 0, 24, layer=0)

    Args:
        log: value of `--log-json`, for commands decorated with `logged`.
    """
    shown: AbstractContextManager[View] = Terminal(console) if console.is_interactive else nullcontext(Lines())
    with shown as view:
        steps = Steps([view] if log is None else [view, log])
        if console.is_interactive:  # elsewhere a mistake that is found at the start stays one line
            steps.begin(view)
        yield steps
        steps.end()
