"""`moqa profile`: measure a model on distributions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import print_table, say, warn_left_out, write_result
from moqa.cli.progress import LogOption, logged, progress
from moqa.cli.progress.limits import time_limited
from moqa.compression.options import DEFAULTS
from moqa.execution.registry import DEFAULT_EXECUTOR

if TYPE_CHECKING:
    from moqa.profiling import Profile


@app.command()
@logged
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of the original model")],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="profile folder; reused if it exists")],
    samples: options.Samples = DEFAULTS.samples,
    context: options.Context = DEFAULTS.context,
    self_samples: options.SelfSamples = DEFAULTS.self_samples,
    own_text: Annotated[
        str, typer.Option("--own-text", help="how the model writes its own text: drawn, or balanced over its experts")
    ] = "drawn",
    group_size: options.GroupSize = DEFAULTS.group_size,
    symmetric: options.Symmetric = DEFAULTS.symmetric,
    method: options.Method = DEFAULTS.method,
    no_sensitivity: Annotated[bool, typer.Option("--no-sensitivity")] = False,
    seed: int = DEFAULTS.seed,
    max_memory: options.MaxMemory = None,
    time_limit: options.TimeLimit = None,
    restart: options.Restart = False,
    engine: options.Engine = DEFAULT_EXECUTOR,
    ray_address: options.RayAddress = None,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Measure the contribution of experts and channels, and the cost of lower precision, on each distribution."""
    from moqa.execution import find_executor
    from moqa.memory.limit import MemoryLimit
    from moqa.profiling import profile as run

    executor = find_executor(engine, address=ray_address)
    with progress(log_json) as report:
        result = run(
            model, data, out, samples=samples, context=context, self_samples=self_samples, own_text=own_text,
            group_size=group_size, symmetric=symmetric, method=method, seed=seed,
            report=time_limited(report, time_limit), memory=MemoryLimit.parse(max_memory) if max_memory else None,
            restart=restart, engine=executor, sensitivity=not no_sensitivity,
        )  # fmt: skip
    print_profile(result)
    write_result(result.record, json)


def print_profile(result: "Profile") -> None:
    """Print the cost of uniform widths per distribution, and warn of experts that no token reached."""
    from moqa.models.units import ROLES

    record = result.record
    measured = (2, 3, 4) if record.settings.sensitivity else ()
    uniform = {w: record.widths.index(w) for w in measured if w in record.widths}
    rows = []
    for name, entry in record.distributions.items():
        costs = [f"{float(result.sensitivity(name)[:, column].sum()):.4f}" for column in uniform.values()]
        rows.append([name, str(entry.samples), str(entry.tokens), *costs])
    kinds = ", ".join(
        f"{sum(u.role == role for u in record.units)} {role}"
        for role in ROLES
        if any(u.role == role for u in record.units)
    )
    print_table(
        ["distribution", "samples", "tokens", *(f"KL at {w} bits" for w in uniform)],
        rows,
        f"{record.model} ({record.model_type}): {len(record.units)} units ({kinds}) in {record.layers} layers",
    )
    warn_left_out(record.left_out)
    warn_starved(result)


def warn_starved(result: "Profile") -> None:
    """Warn of experts that no calibration token reached, and say how they are quantized."""
    starved = result.starved()
    if starved:
        say(
            f"moqa: warning: no calibration token reached {', '.join(starved[:8])}"
            f"{f' and {len(starved) - 8} more' if len(starved) > 8 else ''}: "
            "they are rounded to nearest (rtn); add --data that reaches them",
            err=True,
        )
