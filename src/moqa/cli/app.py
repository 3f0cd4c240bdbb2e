"""The application that all commands register with; what an option lacks of its help comes from the library."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from moqa.cli.common import only_json, say
from moqa.cli.examples import EXAMPLES
from moqa.cli.recipe import prefer_typed
from moqa.compression.options import help_of, one_of
from moqa.execution.registry import EXECUTORS
from moqa.exports.registry import FORMATS
from moqa.planning.registry import STRATEGIES

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command that fills in missing help of its options from the options of `moqa.compress` and the registries."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options; commands with a choice of strategies also describe each strategy."""
        for param in self.params:
            if getattr(param, "help", None) is None and param.name is not None:
                param.help = _help_of(param.name)
        super().format_options(ctx, formatter)
        if any(param.name == "strategy" for param in self.params):
            with formatter.section("Strategies"):
                formatter.write_dl([(name, member.help) for name, member in STRATEGIES.items()])
        if any(param.name == "to" for param in self.params):
            with formatter.section("Formats"):
                formatter.write_dl(list(FORMATS.items()))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, whose lines can be copied as they are."""
        _write_examples(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; after Ctrl-C, say what is kept."""
        prefer_typed(ctx)
        try:
            with only_json(ctx.params.get("json")):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say(f"moqa: interrupted: {_kept(ctx.params)}", err=True)
            raise typer.Exit(130) from None


class Commands(TyperGroup):
    """All commands, in the order of the work."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See `typer.core.TyperGroup.list_commands`."""
        return sorted(super().list_commands(ctx), key=list(EXAMPLES).index)


class CommandGroup(TyperGroup):
    """A command that has commands of its own; its examples are theirs."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """See `Command.format_epilog`."""
        _write_examples(ctx, formatter)


class App(typer.Typer):
    """A Typer application whose options take their help from the library."""

    def command(self, *args: Any, **options: Any) -> Callable[[Function], Function]:
        """See `typer.Typer.command`."""
        return super().command(*args, **{"cls": Command, **options})


app = App(name="moqa", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        from moqa import __version__

        say(f"moqa {__version__}")
        raise typer.Exit


@app.callback()
def moqa(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print the version and exit")
    ] = False,
) -> None:
    """Give precision to the parts of a Mixture-of-Experts model that the data needs."""


def _write_examples(ctx: Any, formatter: Any) -> None:
    while ctx.parent is not None and ctx.parent.parent is not None:
        ctx = ctx.parent
    with formatter.section("Examples"):
        for line in EXAMPLES[str(ctx.command.name)]:
            formatter.write(f"  {line}\n")


def _help_of(option: str) -> str | None:
    if option == "engine":
        kinds = [f"{name} ({where})" for name, where in EXECUTORS.items()]
        return f"where the work is done: {one_of(kinds)}"
    if option == "no_sensitivity":
        unmeasured = [name for name, member in STRATEGIES.items() if not member.needs_sensitivity]
        return f"do not measure sensitivities; {', '.join(unmeasured)} do not need them"
    return help_of(option)


def _kept(params: dict[str, Any]) -> str:
    """What an interrupted command leaves: those that can start again with `--restart` go on by themselves."""
    if "restart" not in params or params.get("dry_run"):
        return "no file was written"
    return f"what is finished is kept beside {params['out']}, and the same command goes on from there"
