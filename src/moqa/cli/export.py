"""`moqa export`: write a plan, profile or checkpoint in a format of another engine."""

from pathlib import Path
from typing import Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, say, write_result
from moqa.cli.progress import LogOption, logged, progress


@app.command()
@logged
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="plan, profile or checkpoint, see Formats")],
    to: options.To,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="file to write, or folder")],
    profile: Annotated[
        Path | None, typer.Option("--profile", help="profile that a plan was made from [default: as in the plan]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="the original [default: where the profile or checkpoint says]")
    ] = None,
    width: options.Width = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = None,
    log_json: LogOption = None,
) -> None:
    """Write a file for another engine: llama.cpp, vLLM, transformers."""
    from moqa.exports import export as run
    from moqa.profiling import read_profile

    with progress(log_json) as report:
        done = run(
            source, out, to=to, profile=read_profile(profile) if profile else None, model=model, overwrite=overwrite,
            restart=restart, report=report, width=width,
        )  # fmt: skip
    say(f"{done.path}: {mib(done.bytes)}")
    for remark in done.remarks:
        say(remark)
    write_result({"path": done.path, "format": done.format, "bytes": done.bytes, "remarks": list(done.remarks)}, json)
