"""`moqa adjust`: fit a checkpoint to a novel distribution."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import print_table, write_result
from moqa.cli.progress import LogOption, logged, progress

if TYPE_CHECKING:
    from moqa.adjustment import Adjusted


@app.command()
@logged
def adjust(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="checkpoint, made with --cache: folder or Hub id")],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="ADJ", help="adjustment folder to make")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="windows of 256 tokens to read")] = 64,
    budget: Annotated[str, typer.Option("--bytes", help="extra bytes, as a share of the checkpoint's")] = "1%",
    mode: Annotated[str, typer.Option("--mode", help="residual, fp16, requant or swap")] = "residual",
    rule: Annotated[
        str, typer.Option("--rule", help="how channels are chosen: gain, dynamics (MoQa's) or random")
    ] = "gain",
    seed: int = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Fit a checkpoint to texts that it was not made for: a small file, switched on or off in milliseconds."""
    from moqa.adjustment import adjust as run

    with progress(log_json) as report:
        result = run(
            checkpoint, data, out, samples=samples, budget=budget, mode=mode, rule=rule, seed=seed,
            overwrite=overwrite, report=report,
        )  # fmt: skip
    print_adjusted(result)
    write_result(result, json)


def print_adjusted(result: "Adjusted") -> None:
    """Print what was written, and the expected gain."""
    before = "-" if result.divergence is None else f"{result.divergence:.5f}"
    rows = [[
        result.adjustment, result.name, result.mode, str(result.channels), str(result.units),
        f"{result.extra_bytes} ({result.extra_bytes_percent:+.2f} %)", before, f"{result.search_seconds:.1f} s",
    ]]  # fmt: skip
    headings = ["adjustment", "for", "mode", "rows and columns", "units", "extra bytes", "KL of samples", "search"]
    print_table(headings, rows)
