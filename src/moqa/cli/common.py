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

from moqa.errors import printable
from moqa.storage.artifact import write_json

_BEGAN = time.perf_counter()

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


def start_and_end() -> float:
    """Seconds for the start and end of a command, measured once it has started; ending takes a quarter as long."""
    return 1.25 * (time.perf_counter() - _BEGAN)
