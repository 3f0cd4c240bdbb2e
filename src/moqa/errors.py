"""The exception type for all errors that a user can cause."""

import math

_LONGEST = 1500  # characters of a message


class MoqaError(Exception):
    """An error in the user's input: one line that says what was typed, what was found and what would work.

    >>> raise MoqaError("--bpw 1.2 is below the smallest plan", "reachable: 2.38 to 8.38")
    Traceback (most recent call last):
    moqa.errors.MoqaError: --bpw 1.2 is below the smallest plan: reachable: 2.38 to 8.38

    A bug raises an ordinary exception and keeps its traceback; commands exit with code 2 only for this one.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        # names read from hostile files may be long, contain line breaks, or tell a terminal what to do
        text = printable(f"{what}: {remedy}" if remedy else what)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")


class UnreadableError(MoqaError):
    """A file of the original cannot be read; finished parts of long work are kept."""


class LittleMemoryError(MoqaError):
    """The memory limit is too small for even the smallest piece of work.

    Attributes:
        least: bytes that would be enough.
    """

    def __init__(self, what: str, least: int, or_else: str = "") -> None:
        super().__init__(what, f"at least {math.ceil(least * 100 / 2**30) / 100:.2f} GiB are needed{or_else}")
        self.least = least


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """Work was stopped on purpose before its end; finished parts are kept, and the same command continues."""


def printable(text: str) -> str:
    """Text in one line that a terminal only shows: control characters and the like are escaped.

    >>> printable("\x1b[2Ja name\\nin two lines")
    '\\\\x1b[2Ja name\\\\nin two lines'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: Exception) -> str:
    """The message of another library's exception, in one line.

    >>> one_line(ValueError("a first line\\nand a second"))
    'a first line'
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text
