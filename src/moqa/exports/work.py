"""A single file as the result of work that survives a kill."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moqa.errors import MoqaError
from moqa.exports.registry import ExportJob
from moqa.storage.folders import beside, sync, writing
from moqa.storage.resumable import ResumableRun, check_space, resumable

_WORK = "export"


def check_new_file(job: ExportJob) -> None:
    """Refuse to replace what exists at `out` without `overwrite`, and anything that is no file.

    Raises:
        MoqaError: naming it.
    """
    beside(job.out, _WORK)
    if job.out.exists() and not job.out.is_file():
        raise MoqaError(f"{job.out} exists and is no file", "choose another -o")
    if job.out.exists() and not job.overwrite:
        raise MoqaError(f"{job.out} exists", "choose another -o, or give --overwrite")


@contextmanager
def file_of_work(job: ExportJob, facts: Mapping[str, Any], needs: int) -> Iterator[tuple[ResumableRun, Path]]:
    """A `with` block that writes one file; the file appears whole, or not at all.

    Args:
        job: says where it appears.
        facts: everything that it depends on, as JSON.
        needs: most bytes that the work has on the disk.

    Returns:
        The run, and the path to write to.

    Raises:
        MoqaError: see `check_new_file` and `resumable`.
    """
    check_new_file(job)
    check_space(job.out, needs)
    folder = beside(job.out, _WORK)
    with resumable(folder, facts, overwrite=True, restart=job.restart) as work:
        path = work.result / job.out.name
        yield work, path
        with writing(job.out):
            sync(path)
            path.chmod(0o644)
            path.rename(job.out)
            sync(job.out.parent)
    shutil.rmtree(folder, ignore_errors=True)
