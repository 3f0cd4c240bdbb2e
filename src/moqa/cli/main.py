"""Entry point of the command line."""

import os
import sys

from moqa.cli.app import app
from moqa.errors import MoqaError, Stopped
from moqa.support import check_system


def main() -> None:
    """Run the command line: a user's error prints one line and exits with code 2, a bug keeps its traceback."""
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
