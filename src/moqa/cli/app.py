"""The application that all commands register with; what an option lacks of its help comes from the library."""

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from moqa.compression.options import help_of, one_of
from moqa.execution.registry import EXECUTORS
from moqa.planning.registry import STRATEGIES

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command that fills in missing help of its options from the options of `moqa.compress` and the registries."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options; commands with a choice of strategies also describe each strategy."""
        for param in self.params:
            if getattr(param, "help", None) is None and param.name is not None:
                param.help = _help_of(param.name)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)
        if any(param.name == "strategy" for param in self.params):
            with formatter.section("Strategies"):
                formatter.write_dl([(name, member.help) for name, member in STRATEGIES.items()])


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


def _help_of(option: str) -> str | None:
    if option == "engine":
        kinds = [f"{name} ({where})" for name, where in EXECUTORS.items()]
        return f"where the work is done: {one_of(kinds)}"
    if option == "no_sensitivity":
        unmeasured = [name for name, member in STRATEGIES.items() if not member.needs_sensitivity]
        return f"do not measure sensitivities; {' and '.join(unmeasured)} do not need them"
    return help_of(option)
