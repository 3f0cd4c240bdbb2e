"""`moqa recover`: train a checkpoint to answer as its original, without a byte more."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import print_table, say, write_result
from moqa.cli.progress import LogOption, logged, progress
from moqa.cli.progress.limits import time_limited
from moqa.training.optimizers import DEFAULT_OPTIMIZER

if TYPE_CHECKING:
    from moqa.training import Recovered


@app.command()
@logged
def recover(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="checkpoint: folder or Hub id")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NEW", help="checkpoint folder to make")],
    length: Annotated[
        str, typer.Option("--for", metavar="LENGTH", help="time such as 15m, or number of steps such as 300")
    ] = "15m",
    profile: Annotated[
        Path | None, typer.Option("--profile", help="profile of the checkpoint [default: as in its plan.json]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="the original [default: where the checkpoint was made from]")
    ] = None,
    optimizer: options.Optimizer = DEFAULT_OPTIMIZER,
    weights: Annotated[
        bool, typer.Option("--weights", help="train integers, too, with the rounding in the loop")
    ] = False,
    input_bits: Annotated[
        int | None, typer.Option("--input-bits", metavar="8", help="round inputs as native kernels do [default: exact]")
    ] = None,
    kv_bits: options.KvBits = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="largest relative change of a scale in a step [default: 0.002]")
    ] = None,
    seed: int = 0,
    max_memory: options.MaxMemory = None,
    time_limit: options.TimeLimit = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Train scales, zero-points, norms and routers of a checkpoint by the original's predictions: no byte more."""
    from moqa.memory.limit import MemoryLimit
    from moqa.profiling import read_profile
    from moqa.training import recover as run

    with progress(log_json) as report:
        result = run(
            checkpoint, out, length=length, profile=read_profile(profile) if profile else None, model=model, seed=seed,
            optimizer=optimizer, weights=weights, input_bits=input_bits, kv_bits=kv_bits, rate=rate,
            memory=MemoryLimit.parse(max_memory) if max_memory else None, overwrite=overwrite,
            restart=restart, report=time_limited(report, time_limit),
        )  # fmt: skip
    print_recovered(result)
    write_result({"checkpoint": result.checkpoint, **result.recovery.model_dump()}, json)


def print_recovered(result: "Recovered") -> None:
    """Print divergence and routing before and after."""
    done = result.recovery
    change = done.after / done.before - 1 if done.before > 0 else 0.0
    routed = ["-" if share is None else f"{share:.2%}" for share in (done.routing_before, done.routing_after)]
    rows = [
        ["before", f"{done.before:.5f}", routed[0]],
        [
            f"after {done.steps} steps{' of each block' if done.blockwise else ''}",
            f"{done.after:.5f} ({change:+.0%})",
            routed[1],
        ],
    ]
    print_table([result.checkpoint, "KL of held-out samples", "experts as in the original"], rows)
    if not done.kept:
        say("moqa: warning: training did not help, the checkpoint stores what it did before", err=True)
