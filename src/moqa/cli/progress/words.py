"""Readable text for a step: its facts, times and memory."""

import re
import sys
from datetime import timedelta
from pathlib import Path

from moqa.cli.progress.steps import Step


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


def memory() -> tuple[int | None, int]:
    """Resident bytes of this process now (None where the system does not report them), and their peak.

    >>> now, peak = memory()
    """
    try:
        status = Path("/proc/self/status").read_bytes()
        found = dict(re.findall(rb"(VmRSS|VmHWM):\s*(\d+) kB", status))
        return int(found[b"VmRSS"]) * 1024, int(found[b"VmHWM"]) * 1024
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # bytes on macOS, KiB elsewhere
        return None, peak if sys.platform == "darwin" else peak * 1024
