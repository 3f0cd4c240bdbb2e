"""The application that all commands register with."""

from collections.abc import Callable
from typing import Any, TypeVar

import typer

from moqa.cli.help import Command

Function = TypeVar("Function", bound=Callable[..., Any])


class App(typer.Typer):
    """A Typer application whose options take their help from the library."""

    def command(self, *args: Any, **options: Any) -> Callable[[Function], Function]:
        """See `typer.Typer.command`."""
        return super().command(*args, **{"cls": Command, **options})


app = App(
    name="moqa",
    help="Gives precision to the parts of a Mixture-of-Experts model that the data needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
