"""`moqa plan`: choose a scheme for every unit, within a budget."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, say, start_and_end, write_result
from moqa.cli.parse import DEFAULT_ENCODINGS, DEFAULT_WIDTHS, candidates_of
from moqa.compression.options import DEFAULTS
from moqa.errors import MoqaError
from moqa.planning.engines import OWN
from moqa.planning.registry import DEFAULT_STRATEGY, OPTIMUM, PLAIN

if TYPE_CHECKING:
    from moqa.estimate import Estimate
    from moqa.planning import Account, MemoryBudget, Plan
    from moqa.profiling import Profile


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="profile folder")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="plan file to write")],
    bpw: options.Bpw = None,
    size: options.Size = None,
    fit: options.Fit = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="with --fit: tokens of a conversation [default: 8192, or the model's]"),
    ] = None,
    batch: options.Batch = None,
    strategy: options.Strategy = DEFAULTS.strategy,
    engine: options.ServedBy = OWN,
    ties: options.EngineTies = None,
    known: Annotated[str | None, typer.Option("--known", help="distributions to fit on [default: all]")] = None,
    widths: str = DEFAULT_WIDTHS,
    encodings: options.Encodings = DEFAULT_ENCODINGS,
    groups: options.Groups = None,
    floor: options.Floor = None,
    hedge: float | None = DEFAULTS.hedge,
    objective: options.Objective = DEFAULTS.objective,
    scope: options.Scope = DEFAULTS.scope,
    ignore: options.Ignore = None,
    set_width: options.SetWidth = None,
    seed: int = DEFAULTS.seed,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="estimate the cost of quantizing by the plan, and write nothing")
    ] = False,
    json: options.Json = None,
) -> None:
    """Choose a scheme for every unit from a profile."""
    from moqa.planning import Budget, MemoryBudget, for_file
    from moqa.planning import memory_budget as fitted
    from moqa.planning import plan as run
    from moqa.profiling import read_profile
    from moqa.storage.artifact import write_sealed

    check_budgets(bpw, size, fit, context, batch)
    if fit is not None and engine != OWN:
        raise MoqaError(f"--fit {fit} is for moqa's own runtime", f"give --bpw or --size with --engine {engine}")
    if dry_run and engine != OWN:
        raise MoqaError(f"--dry-run estimates moqa quantize, and not what --engine {engine} needs", "leave it out")
    measured = read_profile(profile)
    budget = Budget.parse(bpw, size) if fit is None else fitted(measured, fit, context=context, batch=batch or 1)
    result = run(
        measured, budget, strategy=strategy, engine=engine, ties=ties,  # type: ignore[arg-type]
        known=known.split(",") if known else None, hedge=hedge, seed=seed,
        objective=objective, scope=scope,  # type: ignore[arg-type]
        **candidates_of(widths, encodings, groups, floor, ignore, set_width),
    )  # fmt: skip
    if dry_run:
        from moqa.estimate import estimate

        print_estimate(estimate(measured.original, result, measured, before=start_and_end()), result, measured, json)
        return
    write_sealed(for_file(result, out), out)
    print_plan(result)
    say_if_uniform(strategy, result)
    if isinstance(budget, MemoryBudget):
        print_fit(budget, result.account)
    write_result(for_file(result, out), json)


def check_budgets(bpw: float | None, size: str | None, fit: str | None, context: int | None, batch: int | None) -> None:
    """Refuse more than one budget, and options of `--fit` without it.

    Raises:
        MoqaError: if there is such a conflict; the message names the options.
    """
    given = {"--bpw": bpw, "--size": size, "--fit": fit}
    typed = [f"{option} {value}" for option, value in given.items() if value is not None]
    if len(typed) > 1 and fit is not None:
        raise MoqaError(
            f"{' and '.join(typed)} are {'two' if len(typed) == 2 else 'three'} budgets", "give one of them"
        )
    for option, value in {"--context": context, "--batch": batch}.items():
        if value is not None and fit is None:
            raise MoqaError(f"{option} {value} needs --fit", "it belongs to a memory budget, e.g. --fit 8GiB")


def print_plan(result: "Plan") -> None:
    """Print the bytes, the number of units per encoding and width, and the expected divergence."""
    account = result.account
    say(
        f"{result.label}: {account.bits_per_weight:.3f} bits per weight, {mib(account.checkpoint)} "
        f"({mib(account.units)} units, {mib(account.kept)} kept, {mib(account.headers)} headers)"
    )
    counts = Counter((scheme.storage.name, scheme.width) for scheme in result.units.values())
    widths = sorted({width for _, width in counts})
    rows = [[name, *(str(counts[name, w] or "") for w in widths)] for name in sorted({name for name, _ in counts})]
    print_table(["units by width", *map(str, widths)], rows)
    if result.predicted:
        rows = [["expected KL", *(f"{value:.4f}" for value in result.predicted.values())]]
        if result.gains:
            rows.append(["less than uniform by", *(str(result.gains[name]) for name in result.predicted)])
        print_table(["", *result.predicted], rows)
    unsure = [name for name, gain in result.gains.items() if gain.low is not None and gain.low <= 0]
    if unsure and result.strategy != PLAIN:
        say(f"moqa: warning: a uniform plan may do as well on {', '.join(unsure)}", err=True)


def say_if_uniform(asked: str, result: "Plan") -> None:
    """Say that the default strategy made a uniform plan, and why."""
    if asked == DEFAULT_STRATEGY and result.strategy == PLAIN:
        say(
            "moqa: one scheme for all units: these samples do not tell that a mixed plan does better "
            f"(--strategy {OPTIMUM} mixes anyway)",
            err=True,
        )


def print_estimate(cost: "Estimate", plan: "Plan", profile: "Profile", json: Path | None) -> None:
    """Print the estimated cost of quantizing by a plan, and the units and bytes per width."""
    time = f"{cost.seconds / 60:.1f} min" if cost.seconds >= 100 else f"{cost.seconds:.0f} s"
    rows = [[mib(cost.checkpoint_bytes), mib(cost.peak_bytes), mib(cost.disk_bytes), time]]
    print_table(["checkpoint", "peak memory", "disk", "time"], rows)
    units, sizes = Counter[int](), Counter[int]()
    for unit in profile.record.units:
        scheme = plan.units[unit.name]
        units[scheme.width] += 1
        sizes[scheme.width] += scheme.stored_bytes(unit.shape)
    widths = [[str(width), str(units[width]), mib(sizes[width])] for width in sorted(units)]
    print_table(["width", "units", "size"], widths)
    write_result(cost, json)


def print_fit(fit: "MemoryBudget", account: "Account") -> None:
    """Print how the memory of the served model is divided."""
    parts = {"weights": account.checkpoint, "cache": fit.cache, "overhead": fit.overhead}
    sizes = [*parts.values(), sum(parts.values()), fit.memory]
    label = f"{fit.batch} x {fit.context} tokens"
    print_table(["memory when served", *parts, "total", "limit"], [[label, *map(mib, sizes)]])
