"""`moqa reduce`: make a model with fewer experts per block."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import print_table, say, write_result
from moqa.cli.progress import LogOption, logged, progress
from moqa.compression.options import DEFAULTS
from moqa.reduction.registry import DEFAULT_REDUCTION, REDUCTIONS

if TYPE_CHECKING:
    from moqa.reduction.record import ReductionRecord


@app.command()
@logged
def reduce(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or Hub id of the original model")],
    experts: Annotated[int, typer.Option("--experts", min=1, help="routed experts of each block")],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="model folder to make")],
    by: Annotated[
        str, typer.Option("--by", help="frequency keeps the most used experts, random some; uncurl merges them",
                          autocompletion=lambda incomplete: [n for n in REDUCTIONS if n.startswith(incomplete)])
    ] = DEFAULT_REDUCTION,
    samples: options.Samples = DEFAULTS.samples,
    context: options.Context = DEFAULTS.context,
    seed: int = DEFAULTS.seed,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:  # fmt: skip
    """Keep the experts that a task's texts use, or merge those that a router treats alike: a smaller plain model."""
    from moqa.reduction.record import read_reduction
    from moqa.reduction.run import reduce as run

    with progress(log_json) as report:
        made = run(
            model, experts, data, out, by=by, samples=samples, context=context, seed=seed, overwrite=overwrite,
            restart=restart, report=report,
        )  # fmt: skip
    record = read_reduction(made)
    assert record is not None
    print_reduction(str(out), record)
    write_result(record, json)


def print_reduction(name: str, record: "ReductionRecord") -> None:
    """Print the sizes of the groups of each block."""
    rows = []
    for layer, groups in record.groups.items():
        sizes = sorted((groups.count(index) for index in range(record.experts)), reverse=True)
        rows.append([f"block {layer}", " ".join(map(str, sizes)), str(groups.count(-1))])
    say(f"{name}: {record.before} experts of each block by {record.by} to {record.experts}")
    print_table(["", "merged into one", "dropped"], rows)
