"""`moqa verify`: check that a checkpoint is complete and as it was written."""

from typing import Annotated

import typer

from moqa.cli.app import app
from moqa.cli.common import say


@app.command()
def verify(out: Annotated[str, typer.Argument(metavar="OUT", help="folder or Hub id of a checkpoint")]) -> None:
    """Check every byte of a checkpoint that loading uses; exit 0 if it is sound, 2 with a line for each fault."""
    from moqa.runtime.verify import verify as run

    found = run(out)
    for fault in found.faults:
        say(f"moqa: {fault}", err=True)
    if found.faults:
        raise typer.Exit(2)
    checkpoint, manifest = found.checkpoint, found.checkpoint.manifest
    say(
        f"{out}: sound, {len(manifest.files)} files, {checkpoint.bytes} bytes, {len(manifest.units)} units "
        f"and {len(manifest.kept)} kept tensors, each stored once"
    )
    say(f"covered: {', '.join(found.covered)}")
    if found.uncovered:
        say(f"not covered, because this checkpoint was made by an older moqa: {', '.join(found.uncovered)}")
