"""Long work that survives a kill: finished steps are kept next to the result, and the same command continues."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moqa.errors import MoqaError, Stopped, UnreadableError
from moqa.storage.folders import check_free, put_in_place, sync, writing

_JOB, _LOCK, _RESULT, _STEPS = "job.json", "lock", "result", "steps"


class ResumableRun:
    """A folder that is not complete yet, with the steps that are done.

    >>> with resumable(Path("runs/resumed"), {"model": "..."}) as work:
    ...     if work.done("layer-0") is None:
    ...         work.save("hidden-1", {"x": torch.ones(3)})
    ...         work.mark_done("layer-0", {"error": 0.1})
    >>> Path("runs/resumed").is_dir()
    True

    Attributes:
        folder: the work folder; other processes open it by this path.
        result: folder that becomes the result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._steps, self.result = folder, folder / _STEPS, folder / _RESULT
        self._fresh: list[Path] = []

    @property
    def begun(self) -> bool:
        """Whether any step is done."""
        return any(self._steps.glob("*.json"))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under a name; they are safe on the disk after the next `mark_done`."""
        path, fresh = self._steps / f"{name}.safetensors", self._steps / f".{uuid4().hex}"
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh)
            # atomically: a worker that was believed lost may write the same file again while others read it
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
        self._fresh.append(path)

    def load(self, name: str) -> dict[str, Tensor]:
        """Saved tensors.

        Raises:
            MoqaError: if they are damaged.
        """
        path = self._steps / f"{name}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise MoqaError(f"{path} is damaged ({error})", "start over with --restart") from None

    def remove(self, name: str) -> None:
        """Remove saved tensors; a pattern such as `hidden-*` removes several."""
        for path in self._steps.glob(f"{name}.safetensors"):
            path.unlink()

    def mark_done(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a step is done; everything that was saved before is on the disk when this returns."""
        self.flush()
        _write_whole(self._steps / f"{name}.json", facts)

    def flush(self) -> None:
        """Write everything that this process saved through to the disk, before another process calls `mark_done`."""
        for path in self._fresh:
            if path.is_file():
                sync(path)
        self._fresh = []

    def done(self, name: str) -> dict[str, Any] | None:
        """What was recorded of a step; None if it is not done."""
        return _read(self._steps / f"{name}.json")


@contextmanager
def resumable(
    out: Path, job: Mapping[str, Any], overwrite: bool = False, restart: bool = False
) -> Iterator[ResumableRun]:
    """Work on a folder that becomes `out` if the `with` block succeeds.

    After a kill, a stop, or a disk or memory error, the finished steps stay next to `out` for the next run; after any
    other error nothing stays.

    Args:
        out: the folder to make.
        job: everything that the result depends on, as JSON.
        overwrite: replace an existing folder.
        restart: discard earlier work.

    Raises:
        MoqaError: if `out` may not be replaced or cannot be written, another process is writing it, or earlier work
            on it belongs to another job.
    """
    check_free(out, overwrite)
    folder = folder_beside(out)
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, out)
    with lock:
        with writing(out):
            _same_job(folder, job, out, restart)
        work = ResumableRun(folder)
        keep = False
        try:
            for path in (folder / _STEPS, work.result):
                path.mkdir(exist_ok=True)
            yield work
            if not _holds(lock, folder):
                raise _removed(out, folder)
            put_in_place(work.result, out)
        except (OSError, SafetensorError, MoqaError) as error:
            if not _holds(lock, folder):
                raise _removed(out, folder) from None
            if isinstance(error, MoqaError) and not isinstance(error, UnreadableError):
                raise
            keep = work.begun
            again = "run the same command again to continue"
            if isinstance(error, UnreadableError):
                raise MoqaError(str(error), f"{again} once it can be read" if keep else "") from None
            raise MoqaError(f"{out} could not be written: {error}", again if keep else "nothing was kept") from None
        except (KeyboardInterrupt, SystemExit, MemoryError, Stopped):
            keep = work.begun
            raise
        finally:
            # if the folder was removed, another process may have started a new one
            if not keep and (_holds(lock, folder) or not (folder / _LOCK).exists()):
                shutil.rmtree(folder, ignore_errors=True)


def folder_beside(out: Path) -> Path:
    """The work folder of `out` until it is complete."""
    return out.with_name(f".{out.name}.partial")


def check_space(out: Path, needs: int) -> None:
    """Refuse work that does not fit on the disk, before anything is written.

    >>> check_space(Path("runs/out"), 10**16)
    Traceback (most recent call last):
    moqa.errors.MoqaError: runs/out needs about 9.31e+06 GiB, ... GiB are free on its disk: free some, or choose ...

    Args:
        out: the folder to make.
        needs: most bytes that the work has on the disk; files of an unfinished run count as free.

    Raises:
        MoqaError: naming both sizes.
    """
    try:
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
        disk = shutil.disk_usage(there)
        held = sum(path.stat().st_size for path in folder_beside(out).rglob("*") if path.is_file())
    except OSError:
        return  # writing will report what is wrong
    # /proc and similar file systems report a size of 0
    if disk.total and needs > disk.free + held:
        raise MoqaError(
            f"{out} needs about {(needs - held) / 2**30:.3g} GiB, {disk.free / 2**30:.3g} GiB are free on its disk",
            "free some, or choose an -o on another disk",
        )


def _locked(folder: Path, out: Path) -> IO[str]:
    """The folder's lock, held until it is closed or the process ends."""
    while True:
        lock = (folder / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise MoqaError(f"{out} is being written by another process", "wait for it, or choose another -o") from None
        # the process that held the lock may have removed the folder in the meantime
        if _holds(lock, folder):
            return lock
        lock.close()
        folder.mkdir(parents=True, exist_ok=True)


def _holds(lock: IO[str], folder: Path) -> bool:
    """Whether the folder's lock file is still this one."""
    path = folder / _LOCK
    return path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def _removed(out: Path, folder: Path) -> MoqaError:
    return MoqaError(f"{out} could not be written: somebody removed {folder}", "run the same command again")


def _same_job(folder: Path, job: Mapping[str, Any], out: Path, restart: bool) -> None:
    """Keep earlier work on the same job, or clear the folder for this one."""
    wanted, old = json.loads(json.dumps(job)), _read(folder / _JOB)
    if old == wanted and not restart and (folder / _RESULT).is_dir():
        return
    if old is not None and old != wanted and ResumableRun(folder).begun and not restart:
        key = next(key for key in sorted(old.keys() | wanted.keys()) if old.get(key) != wanted.get(key))
        raise MoqaError(
            f"{out} has an unfinished run with {key} {_short(old.get(key))}, this one has {_short(wanted.get(key))}",
            "finish that one with its own command, or start over with --restart",
        )
    for path in (folder / _STEPS, folder / _RESULT):
        shutil.rmtree(path, ignore_errors=True)
    _write_whole(folder / _JOB, wanted)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_whole(path: Path, facts: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(facts), encoding="utf-8")
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)
