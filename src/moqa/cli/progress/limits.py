"""`--time-limit`: stop long work between two pieces."""

import re
import time

from moqa.errors import MoqaError, Stopped
from moqa.progress import Report

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Seconds from `--time-limit`.

    >>> seconds_of("90m")
    5400.0

    Raises:
        MoqaError: if it is not a time.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    if found is None or not float(found[1]):
        raise MoqaError(f"--time-limit {text} is not a time", "give e.g. 90m, 2h or 1.5d")
    return float(found[1]) * _SECONDS[found[2]]


def time_limited(report: Report, limit: str | None) -> Report:
    """Wrap a report function so that it stops the work when a piece begins after the time limit.

    The first piece is always finished: however short the limit is, repeating the command reaches the end.

    Args:
        report: receives all reports as well.
        limit: as typed; None for no limit.
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
                raise Stopped(f"stopped after {limit} in {step} {done}/{total}; the same command continues from there")
            begun = step, done

    return listen
