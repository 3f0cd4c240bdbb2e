"""Help that is made when it is shown: from the options of the main job, and from what is registered by then."""

from typing import Any

from typer.core import TyperCommand

from moqa.compression.options import help_of, one_of
from moqa.execution.registry import EXECUTORS
from moqa.planning.registry import STRATEGIES


class Command(TyperCommand):
    """A command whose options may leave their help to the library."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options, and what the strategies do where there is a choice of them."""
        for param in self.params:
            if getattr(param, "help", None) is None and param.name is not None:
                param.help = _help_of(param.name)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)
        if any(param.name == "strategy" for param in self.params):
            with formatter.section("Strategies"):
                formatter.write_dl([(name, member.help) for name, member in STRATEGIES.items()])


def _help_of(option: str) -> str | None:
    if option == "engine":
        kinds = [f"{name} ({kind.help})" for name, kind in EXECUTORS.items()]
        return f"where the work is done: {one_of(kinds)}"
    if option == "no_sensitivity":
        unmeasured = [name for name, member in STRATEGIES.items() if not member.needs_sensitivity]
        return f"measure none, which {' and '.join(unmeasured)} do not need"
    return help_of(option)
