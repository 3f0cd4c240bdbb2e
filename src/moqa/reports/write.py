"""`moqa.report`: make one self-contained HTML page from artifacts."""

from collections.abc import Sequence
from pathlib import Path

from moqa.errors import MoqaError
from moqa.storage.artifact import write_whole


def report(artifacts: Sequence[str | Path], out: str | Path) -> Path:
    """Make one HTML page from profiles, plans, checkpoints, adjustments, evaluations and proofs.

    >>> moqa.report(["runs/profile", "runs/out"], "report.html")
    PosixPath('report.html')

    The page needs no network and no other file. A section whose artifacts are missing is left out.

    Args:
        artifacts: files and folders; folders are searched recursively.
        out: file to write; an existing file is replaced once the new page is complete.

    Raises:
        MoqaError: if a path is missing or not an artifact, or nothing is found.
    """
    from moqa.reports.gather import gather
    from moqa.reports.page import render

    out = Path(out)
    if out.is_dir():
        raise MoqaError(f"{out} is a folder", "name the HTML file to write")
    text = render(gather(artifacts))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return out
