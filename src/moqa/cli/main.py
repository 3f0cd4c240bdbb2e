"""Entry point of the command line."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.errors import MoqaError, Stopped
from moqa.support import check_system

if TYPE_CHECKING:
    from moqa.cli.app import App


def main() -> None:
    """Run the command line: a user's error prints one line and exits with code 2, a bug keeps its traceback."""
    try:
        check_system()
        application()()
    except MoqaError as error:
        print(f"moqa: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"moqa: {stop}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("moqa: interrupted", file=sys.stderr)
        sys.exit(130)


def application() -> "App":
    """The application with all commands, which register when their modules are imported."""
    from moqa.cli.app import app
    from moqa.registry import modules_in

    for module in modules_in("moqa.cli", Path(__file__).parent).values():
        importlib.import_module(module)
    return app
