"""`--log-json`: the progress of a command, one JSON object per line."""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ParamSpec

import typer

from moqa import __version__
from moqa.cli.common import console
from moqa.cli.progress.steps import Clock, Step
from moqa.errors import MoqaError
from moqa.memory.process import used

INTERVAL = 0.1  # seconds between two lines of a step, at least
Options = ParamSpec("Options")


class Log:
    """Writes a line when a command begins, lines while its steps report, and a line when it ends or fails.

    >>> log = Log("run.jsonl")
    >>> with log.lasting("profile"):
    ...     log.show(Step("activation"))
    >>> len(Path("run.jsonl").read_text().splitlines())
    3

    Args:
        path: file to write; - for stderr.
        clock: returns the time in seconds.
    """

    def __init__(self, path: str, clock: Clock = time.monotonic) -> None:
        self._path, self._clock, self._began = path, clock, clock()
        self._file: BinaryIO | None = None
        self._lost = False
        self._step: Step | None = None
        self._last = 0.0
        self._waiting: dict[str, Any] | None = None

    @contextmanager
    def lasting(self, command: str) -> Iterator[None]:
        """Log a command from its beginning to its end.

        Args:
            command: name of the command.

        Raises:
            MoqaError: if the file cannot be written; raised before the command begins.
        """
        with ExitStack() as stack:
            try:
                if self._path != "-":
                    # unbuffered: a line is one write, so a killed run leaves only complete lines
                    self._file = stack.enter_context(Path(self._path).open("wb", buffering=0))
                self._write({"event": "start", "time": _time(), "command": command, "moqa": __version__})
            except OSError as error:
                raise MoqaError(f"--log-json {self._path} cannot be written", error.strerror or str(error)) from None
            try:
                yield
            except BaseException as error:
                self._finish(_reason(error))
                raise
            self._finish(None)

    def show(self, step: Step) -> None:
        """Write a line if the step is new or the last line is old enough; otherwise keep it for the end of the step."""
        now, left = self._clock(), step.seconds_left
        resident, peak = used()
        self._waiting = {
            "time": _time(), "step": step.name, "done": step.done, "total": step.total,
            **{name: _finite(value) for name, value in step.facts.items()},
            "memory_bytes": resident, "peak_bytes": peak, "seconds": round(now - self._began, 3),
            "seconds_left": None if left is None else round(left, 3),
        }  # fmt: skip
        if step is not self._step or now - self._last >= INTERVAL:
            self._step, self._last = step, now
            self._flush()

    def end(self, _step: Step) -> None:
        """Write the line that was kept."""
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self._put(self._waiting)
            self._waiting = None

    def _finish(self, error: str | None) -> None:
        self._flush()
        seconds = round(self._clock() - self._began, 3)
        self._put({"event": "end", "time": _time(), "ok": error is None, "error": error, "seconds": seconds})

    def _put(self, record: dict[str, Any]) -> None:
        if self._lost:
            return
        try:
            self._write(record)
        except OSError as error:
            # a full disk ends the log, but must not end hours of work
            self._lost = True
            reason = error.strerror or str(error)
            print(f"moqa: warning: --log-json {self._path} cannot be written any more: {reason}", file=sys.stderr)

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False)
        if self._file is None:
            # printed above a live view, without wrapping
            console.out(line, highlight=False)
        else:
            self._file.write(f"{line}\n".encode())


LogOption = Annotated[
    Log | None,
    typer.Option("--log-json", metavar="FILE", parser=Log, help="also log progress as JSON lines, - for stderr"),
]


def logged(command: Callable[Options, None]) -> Callable[Options, None]:
    """Decorate a command so that it writes the log that it gets as `log_json`.

    >>> @logged
    ... def profile(model: str, log_json: LogOption = None) -> None: ...
    """

    @wraps(command)
    def run(*args: Options.args, **options: Options.kwargs) -> None:
        log = options.get("log_json")
        with log.lasting(command.__name__) if isinstance(log, Log) else nullcontext():
            command(*args, **options)

    return run


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _finite(value: float | str) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: BaseException) -> str:
    if isinstance(error, MoqaError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # only where a bug occurred: its message may quote a text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {place.filename}:{place.lineno}"
