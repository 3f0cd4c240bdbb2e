"""The command line: one file per command; each parses, calls the library and prints."""

import os
import sys

import typer

from moqa.errors import MoqaError, Stopped
from moqa.support import check_system

app = typer.Typer(
    name="moqa",
    help="Gives precision to the parts of a Mixture-of-Experts model that the data needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit code 2, a bug keeps its traceback."""
    try:
        check_system()
        _register()
        app()
    except MoqaError as error:
        print(f"moqa: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"moqa: {stop}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("moqa: interrupted", file=sys.stderr)
        sys.exit(130)


def _register() -> None:
    from moqa.cli import (  # noqa: F401
        adjust,
        bench,
        chat,
        evaluate,
        generate,
        inspect,
        plan,
        profile,
        quantize,
        report,
        serve,
        verify,
    )  # fmt: skip
