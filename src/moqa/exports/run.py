"""`moqa.export`: write a file for another engine."""

from dataclasses import dataclass
from pathlib import Path

from moqa.errors import MoqaError
from moqa.exports.registry import EXPORTS, ExportJob
from moqa.format.reader import is_checkpoint
from moqa.originals.hub import on_disk
from moqa.profiling import Profile
from moqa.progress import Report, quiet


@dataclass(frozen=True)
class Exported:
    """What `moqa export` wrote.

    Attributes:
        path: file or folder.
        format: name in `moqa.exports.EXPORTS`.
        bytes: of all its files.
        remarks: what the user should know of it.
    """

    path: str
    format: str
    bytes: int
    remarks: tuple[str, ...]


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    profile: Profile | None = None,
    model: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
    width: int | None = None,
) -> Exported:
    """Write a plan, profile or checkpoint in a format of another engine.

    >>> moqa.export("runs/profile", "runs/imatrix.gguf", to="imatrix").format
    'imatrix'

    Args:
        source: a plan for `gguf` and `tensor-types`, a profile for `imatrix`, a checkpoint for `compressed-tensors` and
            `moqa`.
        out: file to write, a folder for these two.
        to: one of `moqa.exports.EXPORTS`.
        profile: that a plan was made from; None reads it from the folder that the plan names.
        model: folder or Hub id of the original; None means where the profile or checkpoint says.
        overwrite: replace what exists at `out`.
        restart: start again from the beginning and discard what an earlier run has finished.
        report: called with the name of a step, how much of it is done, and its total.
        width: of a checkpoint with nested widths, see `moqa.load`.

    Raises:
        MoqaError: if the format is unknown, the source is none that it is made from, the engine cannot run the model or
            the plan, a needed package is missing, or `out` exists.
    """
    member, out = EXPORTS.find(to), Path(out)
    if width is not None and not is_checkpoint(on_disk(source)):
        raise MoqaError(f"{source} is not a checkpoint", f"--width {width} needs one")
    original = None if model is None else str(model)
    remarks = member.write(ExportJob(str(source), out, profile, original, overwrite, restart, report, width))
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return Exported(str(out), member.name, sum(path.stat().st_size for path in files), tuple(remarks))
