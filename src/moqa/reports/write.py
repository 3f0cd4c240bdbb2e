"""`moqa.report`: make one self-contained HTML page from artifacts."""

from collections.abc import Sequence
from pathlib import Path

from moqa.errors import MoqaError
from moqa.storage.artifact import write_whole


def report(artifacts: Sequence[str | Path], out: str | Path) -> Path:
    """Make one HTML page from profiles, plans, checkpoints, adjustments and evaluations.

    >>> moqa.report(["runs/profile", "runs/out"], "report.html")
    PosixPath('report.html')

    The page needs no network and no other file. A section whose artifacts are missing is left out.

    Args:
        artifacts: files and folders; folders are searched recursively.
        out: file to write; an existing file is replaced once the new page is complete.

    Raises:
        MoqaError: if a path is missing or not an artifact, nothing is found, or jinja2 or plotly is not installed.
    """
    try:
        from moqa.reports.page import render
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("jinja2", "plotly"):
            raise MoqaError("the report needs `pip install 'moqa[report]'`", f"{error.name} is missing") from None
        raise
    from moqa.reports.gather import gather

    out = Path(out)
    if out.is_dir():
        raise MoqaError(f"{out} is a folder", "name the HTML file to write")
    text = render(gather(artifacts))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return out
