"""`moqa verify`: check that a checkpoint or a mixture is complete and as it was written."""

from typing import Annotated

import typer

from moqa.cli.app import app
from moqa.cli.common import say


@app.command()
def verify(out: Annotated[str, typer.Argument(metavar="OUT", help="checkpoint (folder or Hub id) or mixture")]) -> None:
    """Check every byte of a checkpoint that loading uses; exit 0 if it is sound, 2 with a line for each fault."""
    from moqa.mixture.merged import is_merged, read_merged
    from moqa.mixture.record import is_mixture
    from moqa.runtime.verify import verify as run

    if is_merged(out):
        merged = read_merged(out, verify=True)
        say(f"{out}: sound, a base and {len(merged.variants)} merged variants, {merged.account.total} bytes")
        return
    if is_mixture(out):
        _verify_mixture(out)
        return
    found = run(out)
    _print_faults(found.faults)
    checkpoint, manifest = found.checkpoint, found.checkpoint.manifest
    say(
        f"{out}: sound, {len(manifest.weight_files)} files, {checkpoint.bytes + checkpoint.nested_bytes} bytes, "
        f"{len(manifest.units)} units "
        f"and {len(manifest.kept)} kept tensors, each stored once"
    )
    say(f"covered: {', '.join(found.covered)}")
    if found.uncovered:
        say(f"not covered, because this checkpoint was made by an older moqa: {', '.join(found.uncovered)}")


def _verify_mixture(out: str) -> None:
    from moqa.mixture.verify import verify_mixture

    record, faults = verify_mixture(out)
    _print_faults(faults)
    say(
        f"{out}: sound, {len(record.variants)} variants ({', '.join(record.variants)}) and their router, "
        f"{record.account.total} bytes"
    )


def _print_faults(faults: list[str]) -> None:
    for fault in faults:
        say(f"moqa: {fault}", err=True)
    if faults:
        raise typer.Exit(2)
