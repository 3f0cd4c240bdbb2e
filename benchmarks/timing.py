"""Ratios in one run: contenders take turns, so that what else the machine does meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(
    contenders: Mapping[str, Callable[[int], object]], rounds: int = 7, seconds: float = 0.05
) -> dict[str, float]:
    """Median microseconds of a call of each contender; a call gets its number, to take other data every time."""
    calls = {name: _calls_in(call, seconds) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    number = 0
    for _ in range(rounds):
        for name, call in contenders.items():
            for _ in range(calls[name]):
                number += 1
                started = time.perf_counter()
                call(number)
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


def _calls_in(call: Callable[[int], object], seconds: float) -> int:
    call(0)
    started = time.perf_counter()
    call(1)
    return max(2, min(100, round(seconds / max(time.perf_counter() - started, 1e-6))))
