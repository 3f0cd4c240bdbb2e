"""The application that every command joins."""

import typer

app = typer.Typer(
    name="moqa",
    help="Gives precision to the parts of a Mixture-of-Experts model that the data needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
