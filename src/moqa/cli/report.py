"""`moqa report`: make one HTML page from artifacts."""

from pathlib import Path
from typing import Annotated

import typer

from moqa.cli.app import app
from moqa.cli.common import say


@app.command()
def report(
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="profiles, plans, checkpoints, evaluations, proofs, or folders"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="page to write")] = Path("report.html"),
) -> None:
    """Make one self-contained HTML page from profiles, plans, checkpoints, evaluations and proofs."""
    from moqa.reports import report

    say(str(report(artifacts, out)))
