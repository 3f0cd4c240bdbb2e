"""Options that are typed as text: what commands make of them."""

from collections.abc import Sequence
from typing import Any

from moqa.compression.options import DEFAULTS
from moqa.errors import MoqaError
from moqa.format.tiles import KEEP_WIDTH, check_group_size

DEFAULT_WIDTHS = ",".join(map(str, DEFAULTS.widths))
DEFAULT_ENCODINGS = ",".join(DEFAULTS.encodings)


def candidates_of(
    widths: str, encodings: str, groups: str | None, floor: Sequence[str] | None, ignore: Sequence[str] | None,
    set_width: Sequence[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """What a plan may choose from, by the names that it has in `moqa.plan`, from options of the same names.

    >>> candidates_of("2,3", "int", None, ["attention=4"], None, None)["floors"]
    {'attention': 4}

    Raises:
        MoqaError: if one cannot be read.
    """
    return {
        "widths": _widths(widths), "encodings": tuple(encodings.split(",")), "groups": _groups(groups),
        "floors": _floors(floor), "fixed": _fixed(ignore, set_width),
    }  # fmt: skip


def _widths(text: str) -> tuple[int, ...]:
    """Widths from `--widths`.

    Raises:
        MoqaError: if it is not a list of numbers.
    """
    return _numbers("--widths", text, "widths", "2,3,4")


def widths_nested_of(text: str | None) -> tuple[int, ...]:
    """Widths from `--widths-nested`.

    Raises:
        MoqaError: if it is not a list of numbers.
    """
    return () if text is None else _numbers("--widths-nested", text, "widths", "2,3,4,8")


def _groups(text: str | None) -> tuple[int, ...] | None:
    """Group sizes from `--groups`.

    Raises:
        MoqaError: if it is not a list of numbers.
    """
    return None if text is None else _numbers("--groups", text, "group sizes", "64,128")


def _numbers(option: str, text: str, what: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise MoqaError(f"{option} {text} is not a list of {what}", f"give e.g. {option} {example}") from None


def _floors(typed: Sequence[str] | None) -> dict[str, int] | None:
    """Role -> smallest width from `--floor`; None if there is none, nothing for `--floor none`.

    Raises:
        MoqaError: if one is not ROLE=WIDTH.
    """
    if not typed:
        return None
    floors: dict[str, int] = {}
    for text in typed if list(typed) != ["none"] else ():
        role, _, width = text.rpartition("=")
        if not role or not width.isdecimal() or len(width) > 2:
            raise MoqaError(f"--floor {text} is not ROLE=WIDTH", "give e.g. --floor attention=4, or none")
        floors[role] = int(width)
    return floors


def _fixed(ignore: Sequence[str] | None, widths: Sequence[str] | None) -> dict[str, int]:
    """Pattern -> width from `--set` and `--ignore`, the latter last, as the last one that matches counts.

    Raises:
        MoqaError: if one is not PATTERN=WIDTH.
    """
    fixed: dict[str, int] = {}
    for text in widths or ():
        pattern, _, width = text.rpartition("=")
        if not pattern or not width.isdecimal() or len(width) > 2:
            raise MoqaError(f"--set {text} is not PATTERN=WIDTH", "give e.g. --set '*.down_proj=4'")
        fixed[pattern] = int(width)
    return fixed | dict.fromkeys(ignore or (), KEEP_WIDTH)


def group_size_of(size: int) -> int:
    """Check `--group-size`."""
    check_group_size(size)
    return size
