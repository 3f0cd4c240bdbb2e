"""`moqa compare-plans`: rank the strategies at one budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.parse import DEFAULT_ENCODINGS, DEFAULT_WIDTHS, candidates_of
from moqa.cli.progress import LogOption, logged, progress
from moqa.compression.options import DEFAULTS
from moqa.errors import MoqaError

if TYPE_CHECKING:
    from moqa.evaluation.compare import PlanComparison


@app.command("compare-plans")
@logged
def compare_plans(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="profile folder")],
    bpw: options.Bpw = None,
    size: options.Size = None,
    strategies: Annotated[
        str | None, typer.Option("--strategies", metavar="NAMES", help="to compare, comma-separated [default: all]")
    ] = None,
    known: Annotated[str | None, typer.Option("--known", help="distributions to fit on [default: all]")] = None,
    ties: options.EngineTies = None,
    encodings: options.Encodings = DEFAULT_ENCODINGS,
    groups: options.Groups = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=SOURCE", help="held-out text: quantize by every plan, and measure on it"),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=0, help="windows per held-out text, 0 for all")] = 64,
    method: Annotated[
        str | None, typer.Option("--method", help="quantization method of the measured plans [default: the profile's]")
    ] = None,
    seed: int = DEFAULTS.seed,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Rank the plans of all strategies at one budget, with intervals."""
    from moqa.evaluation.compare import compare_plans as run
    from moqa.planning import Budget
    from moqa.profiling import read_profile

    budget = Budget.parse(bpw, size)
    if budget is None:
        raise MoqaError("no budget to compare plans at", "give --bpw or --size")
    with progress(log_json) as report:
        found = run(
            read_profile(profile), budget, strategies=strategies.split(",") if strategies else None, data=data or None,
            windows=windows or None, method=method, report=report, known=known.split(",") if known else None, ties=ties,
            seed=seed, **candidates_of(DEFAULT_WIDTHS, encodings, groups, None, None, None),
        )  # fmt: skip
    print_comparison(found)
    write_result(found, json)


def print_comparison(found: "PlanComparison") -> None:
    """Print a row per strategy, the best first."""
    texts = list(found.plans[0].measured)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        [
            f"{row.strategy}{f' (plan of {row.made_by})' if row.made_by != row.strategy else ''}",
            f"{row.bits_per_weight:.3f}", mib(row.bytes),
            number(row.expected), number(row.expected_own), str(row.over_uniform or "-"),
            *(f"{row.measured[t].kl_divergence:.4f} ±{row.measured[t].interval:.4f}" for t in texts),
        ]
        for row in found.plans
    ]  # fmt: skip
    by = f"measured divergence, {found.method}" if texts else "expected divergence"
    headings = ["strategy", "bits/weight", "size", "expected KL", "on own text", "less than uniform by"]
    print_table([*headings, *texts], rows, f"{found.model} at {found.budget}, by {by}")
    for name, reason in found.without.items():
        say(f"moqa: warning: no plan of {name}: {reason}", err=True)
