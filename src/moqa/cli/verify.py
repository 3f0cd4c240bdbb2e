"""`moqa verify`: check that a checkpoint is complete and matches its manifest."""

from pathlib import Path
from typing import Annotated

import typer

from moqa.cli.app import app
from moqa.cli.common import say
from moqa.errors import MoqaError


@app.command()
def verify(out: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder")]) -> None:
    """Check every byte of a checkpoint against its manifest and configuration; exit 0 if sound, 1 if not."""
    from moqa.format.reader import open_checkpoint
    from moqa.runtime.load import load_packed

    try:
        checkpoint = open_checkpoint(out, verify=True)
        load_packed(checkpoint, kernels="reference")
    except MoqaError as error:
        say(f"moqa: {error}", err=True)
        raise typer.Exit(1) from None
    manifest = checkpoint.manifest
    say(
        f"{out}: sound, {len(manifest.files)} files, {checkpoint.bytes} bytes, {len(manifest.units)} units "
        f"and {len(manifest.kept)} kept tensors, each stored once"
    )
