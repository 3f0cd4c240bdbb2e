"""Shared by several commands: tables, JSON output."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moqa.compression.options import DEFAULTS
from moqa.errors import MoqaError, printable
from moqa.format.tiles import KEEP_WIDTH, check_group_size
from moqa.storage.artifact import write_json

_BEGAN = time.perf_counter()

DEFAULT_WIDTHS = ",".join(map(str, DEFAULTS.widths))
DEFAULT_ENCODINGS = ",".join(DEFAULTS.encodings)

console = Console(stderr=True)
_json_to: TextIO | None = None


@contextmanager
def only_json(path: object) -> Iterator[None]:
    """While `--json -` is in force, everything but the JSON goes to stderr: stdout is for another program."""
    global _json_to
    if str(path) != "-":
        yield
        return
    _json_to = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_to = None


def say(text: str, err: bool = False) -> None:
    """Print a line, whatever the names in it: on a terminal, escapes of a hostile artifact could rewrite the screen."""
    typer.echo(printable(text), err=err)


def shown(text: str) -> str:
    """A model's text as it is printed: on a terminal, characters that control it are escaped."""
    return "".join(c if c in "\n\t" else printable(c) for c in text) if sys.stdout.isatty() else text


def write_result(result: BaseModel | dict, path: Path | None) -> None:
    """Write a result as JSON to a file, or to stdout if the path is `-`; None writes nothing."""
    if path is None:
        return
    if str(path) == "-":
        data = result.model_dump(mode="json") if isinstance(result, BaseModel) else result
        print(json.dumps(data, indent=1, sort_keys=True), file=_json_to)
    else:
        write_json(result, path)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; the first column is text, all others are numbers."""
    titled = Text(printable(title)) if title else None
    table = Table(title=titled, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(Text(printable(heading)), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # lines are not wrapped when stdout is not a terminal
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.2f} MiB"


def warn_left_out(parts: Mapping[str, int]) -> None:
    """Warn of parts of the original that the result lacks."""
    if parts:
        shown = ", ".join(f"{prefix} ({values:,} values)" for prefix, values in list(parts.items())[:8])
        more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
        say(f"moqa: warning: transformers' model has no {shown}{more}: left out", err=True)


def widths_of(text: str) -> tuple[int, ...]:
    """Widths from `--widths`.

    Raises:
        MoqaError: if it is not a list of numbers.
    """
    return _numbers("--widths", text, "widths", "2,3,4")


def groups_of(text: str | None) -> tuple[int, ...] | None:
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


def floors_of(typed: Sequence[str] | None) -> dict[str, int] | None:
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


def fixed_of(ignore: Sequence[str] | None, widths: Sequence[str] | None) -> dict[str, int]:
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


def start_and_end() -> float:
    """Seconds for the start and end of a command, measured once it has started; ending takes a quarter as long."""
    return 1.25 * (time.perf_counter() - _BEGAN)
