"""Help texts from the library: made when shown, from the options of `moqa.compress` and the registries."""

from typing import Any

from typer.core import TyperCommand

from moqa.compression.options import help_of, one_of
from moqa.execution.registry import EXECUTORS
from moqa.planning.registry import STRATEGIES


class Command(TyperCommand):
    """A command that fills in missing help of its options from the library."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options; commands with a choice of strategies also describe each strategy."""
        for param in self.params:
            if getattr(param, "help", None) is None and param.name is not None:
                param.help = _help_of(param.name)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)
        if any(param.name == "strategy" for param in self.params):
            with formatter.section("Strategies"):
                formatter.write_dl([(name, member.help) for name, member in STRATEGIES.items()])


def _help_of(option: str) -> str | None:
    if option == "engine":
        kinds = [f"{name} ({where})" for name, where in EXECUTORS.items()]
        return f"where the work is done: {one_of(kinds)}"
    if option == "no_sensitivity":
        unmeasured = [name for name, member in STRATEGIES.items() if not member.needs_sensitivity]
        return f"do not measure sensitivities; {' and '.join(unmeasured)} do not need them"
    return help_of(option)
