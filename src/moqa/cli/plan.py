"""`moqa plan`: a scheme for every unit, within a budget."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import app
from moqa.cli.common import (
    BpwOption,
    HedgeOption,
    JsonOption,
    ObjectiveOption,
    ScopeOption,
    SeedOption,
    SizeOption,
    StrategyOption,
    TiesOption,
    WidthsOption,
    mib,
    print_table,
    widths_of,
    write_result,
)  # fmt: skip

if TYPE_CHECKING:
    from moqa.plan import Plan


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="profile folder")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="plan file to write")],
    bpw: BpwOption = None,
    size: SizeOption = None,
    strategy: StrategyOption = "moqa-budget",
    ties: TiesOption = "unit",
    known: Annotated[str | None, typer.Option("--known", help="distributions to fit on [default: all]")] = None,
    widths: WidthsOption = "2,3,4,5,6,8",
    hedge: HedgeOption = None,
    objective: ObjectiveOption = "mean",
    scope: ScopeOption = "global",
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Choose a width for every unit from a profile."""
    from moqa.format.artifact import write_json
    from moqa.plan import Budget, for_file
    from moqa.plan import plan as run
    from moqa.profile import read_profile

    result = run(
        read_profile(profile), Budget.parse(bpw, size), strategy, ties,  # type: ignore[arg-type]
        known=known.split(",") if known else None, widths=widths_of(widths), hedge=hedge,
        objective=objective, scope=scope, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    write_json(for_file(result, out), out)
    print_plan(result)
    write_result(for_file(result, out), json)


def print_plan(result: "Plan") -> None:
    """Bytes, widths per role, and what the plan is expected to cost."""
    account = result.account
    typer.echo(
        f"{result.label}: {account.bits_per_weight:.3f} bits per weight, {mib(account.checkpoint)} "
        f"({mib(account.units)} units, {mib(account.kept)} kept, {mib(account.headers)} headers)"
    )
    counts = Counter(scheme.width for scheme in result.units.values())
    print_table(["width", *map(str, sorted(counts))], [["units", *(str(counts[w]) for w in sorted(counts))]])
    print_table(["expected KL", *result.predicted], [["", *(f"{value:.4f}" for value in result.predicted.values())]])
