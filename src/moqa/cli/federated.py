"""`moqa federated run`: federated training on simulated clients, from a file that says what to do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import Command, CommandGroup, app
from moqa.cli.common import mib, print_table, say, write_result
from moqa.cli.progress import LogOption, logged, progress

if TYPE_CHECKING:
    from moqa.federated.records import FederatedRecord

federated = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(federated, name="federated", help="Federated training in which every client rounds as it suits it.")


@federated.command(cls=Command)
@logged
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="what to do, see docs/federated.md")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="folder to make")],
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Train on simulated clients: model, record and report as one folder; goes on after a kill."""
    from moqa.federated import run as train
    from moqa.federated.settings import read_experiment

    with progress(log_json) as report:
        record = train(read_experiment(config), out, overwrite=overwrite, restart=restart, report=report)
    print_record(record, out)
    write_result(record, json)


def print_record(record: "FederatedRecord", out: Path) -> None:
    """Print what came of an experiment."""
    last, best = record.rounds[-1], record.best
    rows = [
        ["accuracy as stored", f"{record.final_accuracy:.2%}"],
        ["accuracy in full precision", f"{last.metrics['accuracy-exact']:.2%}"],
        ["simulated seconds", f"{record.seconds:.1f}"],
        ["sent by clients", mib(record.uplink_bytes)],
        ["sent to clients", mib(record.downlink_bytes)],
        ["seconds of the allocator", f"{record.allocator_seconds:.2f}"],
    ]
    target = record.experiment.target
    if target is not None and record.seconds_to_target is not None:
        rows.insert(0, [f"seconds to {target:.1%}", f"{record.seconds_to_target:.1f}"])
    print_table([str(out), f"{len(record.rounds) - 1} rounds"], rows)
    for line in (line for one in record.rounds for line in (*one.refused, *one.changes)):
        say(line)
    if target is not None and record.seconds_to_target is None:
        found = f"{best.metrics['accuracy']:.1%} in round {best.round}"
        say(f"moqa: warning: the target of {target:.1%} was not reached, the best is {found}", err=True)
