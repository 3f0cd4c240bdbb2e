"""The one exception type for everything a user can cause."""

import math


class MoqaError(Exception):
    """A mistake in what the user gave: one line that says what was given, what was found and what would work.

    >>> raise MoqaError("--bpw 1.2 is below the smallest plan", "reachable: 2.38 to 8.38")
    Traceback (most recent call last):
    moqa.errors.MoqaError: --bpw 1.2 is below the smallest plan: reachable: 2.38 to 8.38

    A bug is an ordinary exception and keeps its traceback; commands turn only this one into exit code 2.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        text = f"{what}: {remedy}" if remedy else what
        # names out of damaged files may hold anything, and one line is one line
        super().__init__(text.replace("\r", "\\r").replace("\n", "\\n"))


class UnreadableError(MoqaError):
    """A file of the original that cannot be read: if long work is under way, what is done of it stays."""


class LittleMemoryError(MoqaError):
    """A limit of memory that holds nothing that could be worked on.

    Attributes:
        least: bytes that would do.
    """

    def __init__(self, what: str, least: int, or_else: str = "") -> None:
        super().__init__(what, f"at least {math.ceil(least * 100 / 2**30) / 100:.2f} GiB do{or_else}")
        self.least = least


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """Work stopped on purpose before its end; what is done stays, and the same command goes on."""


def one_line(error: Exception) -> str:
    """What a foreign error says, in one line.

    >>> one_line(ValueError("a first line\\nand a second"))
    'a first line'
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text
