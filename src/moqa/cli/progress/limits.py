"""Limits of long work: memory, time, and what an earlier run has left."""

import re
import time
from typing import Annotated

import typer

from moqa.errors import MoqaError, Stopped
from moqa.progress import Report

MemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="memory the process may take, e.g. 4GiB [default: what is free]"),
]
TimeOption = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="stop after the layer at e.g. 90m; the same command goes on"),
]
RestartOption = Annotated[bool, typer.Option("--restart")]  # help: that of `CompressOptions`

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Seconds from `--time-limit`.

    >>> seconds_of("90m")
    5400.0

    Raises:
        MoqaError: if it is no time.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    if found is None or not float(found[1]):
        raise MoqaError(f"--time-limit {text} is no time", "give e.g. 90m, 2h or 1.5d")
    return float(found[1]) * _SECONDS[found[2]]


def time_limited(report: Report, limit: str | None) -> Report:
    """A listener that stops the work when a piece begins after the time is up.

    The first piece is always done: however short the limit is, the same command ends some day.

    Args:
        report: what else listens.
        limit: as typed; None never stops.
    """
    if limit is None:
        return report
    ends = time.monotonic() + seconds_of(limit)
    begun: tuple[str, int] | None = None

    def listen(step: str, done: int, total: int, **facts: float | int | str) -> None:
        nonlocal begun
        report(step, done, total, **facts)
        if done < total:
            if begun not in (None, (step, done)) and time.monotonic() > ends:
                raise Stopped(f"stopped after {limit} in {step} {done}/{total}; the same command goes on from there")
            begun = step, done

    return listen
