"""Long work that survives a kill: finished steps are kept next to the result, and the same command continues."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moqa.errors import MoqaError, Stopped, UnreadableError
from moqa.storage.artifact import checksum, file_hash, write_whole
from moqa.storage.folders import PARTIAL, PLACED, REPLACED, beside, check_free, put_in_place, sync, writing

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
        # sha256 by path in the folder: of files that notes stand for, and of others that are safe on the disk
        self._recorded: dict[str, str] = {}
        self._hashed: dict[str, str] = {}

    @property
    def begun(self) -> bool:
        """Whether any step is done."""
        return any(self._steps.glob("*.json"))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under a name; they are safe on the disk after the next `mark_done`.

        A name that begins with a dot is for tensors that are removed before the step ends.
        """
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
            raise MoqaError(f"{path} is damaged ({error})", "the same command starts over") from None

    def remove(self, name: str) -> None:
        """Remove saved tensors; a pattern such as `hidden-*` removes several."""
        for path in self._steps.glob(f"{name}.safetensors"):
            path.unlink()

    def mark_done(self, name: str, facts: Mapping[str, Any], hashed: Mapping[str, str] | None = None) -> None:
        """Record that a step is done; every file that was written before is on the disk when this returns.

        Args:
            name: of the step.
            facts: what to record of it.
            hashed: sha256 of files of the result that are known since they were written, by path in `result`.
        """
        self.flush()
        known = self._hashed | {f"{_RESULT}/{path}": digest for path, digest in (hashed or {}).items()}
        files = {self._name(path): path for path in self._files() if self._name(path) not in self._recorded}
        for path in (*(files[name] for name in files.keys() - self._hashed.keys()), *self._folders()):
            sync(path)
        note = {"facts": facts, "files": {name: known.get(name) or _digest(path) for name, path in files.items()}}
        _write(self._steps / f"{name}.json", note)
        self._recorded |= note["files"]
        self._hashed = {}

    def flush(self) -> None:
        """Write everything that this process saved through to the disk, before another process calls `mark_done`."""
        for path in self._fresh:
            if path.is_file() and not path.name.startswith("."):
                sync(path)
                self._hashed[self._name(path)] = _digest(path)
        self._fresh = []

    def done(self, name: str) -> dict[str, Any] | None:
        """What was recorded of a step; None if it is not done."""
        note = _read(self._steps / f"{name}.json")
        return None if note is None else note["facts"]

    def check(self) -> str | None:
        """Compare the files of finished steps with their recorded hashes, and remove all others.

        Returns:
            The first file that is not as it was written; None if all are.
        """
        # what follows the last step is written again
        (self._steps / f"{_RESULT}.json").unlink(missing_ok=True)
        for path in sorted(self._steps.glob("*.json")):
            note = _read(path)
            if note is None:
                return self._name(path)
            self._recorded |= note["files"]
        for name, digest in self._recorded.items():
            path = self.folder / name
            # saved tensors may have been removed since; without those that are needed, `load` refuses
            if _digest(path) != digest and (path.exists() or name.startswith(_RESULT)):
                return name
        for path in (*self._files(), *self._steps.glob(".*")):
            if self._name(path) not in self._recorded:
                path.unlink(missing_ok=True)
        return None

    def finish(self, out: Path, job: Mapping[str, Any]) -> None:
        """Put the result in place; a record beside it says so until the work folder is removed."""
        self.mark_done(_RESULT, {})
        of_result = f"{_RESULT}/"
        files = {n.removeprefix(of_result): digest for n, digest in self._recorded.items() if n.startswith(of_result)}
        _write(beside(out, PLACED), {"job": job, "files": files})
        put_in_place(self.result, out)

    def _files(self) -> list[Path]:
        """Files that steps stand for: saved tensors, and all of the result."""
        saved = [path for path in self._steps.glob("*.safetensors") if not path.name.startswith(".")]
        return sorted([*saved, *(path for path in self.result.rglob("*") if not path.is_dir())])

    def _folders(self) -> list[Path]:
        return [self._steps, self.result, *(path for path in self.result.rglob("*") if path.is_dir())]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


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
    tidy(out)
    check_free(out, overwrite)
    folder, job = folder_beside(out), as_json(job)
    with _locked(folder, out) as lock:
        with writing(out):
            work = _continued(folder, job, out, restart)
        keep = False
        try:
            yield work
            if not _holds(lock, folder):
                raise _removed(out, folder)
            work.finish(out, job)
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
                _clear(out)


def tidy(out: Path) -> dict[str, Any] | None:
    """Complete what a kill has left of a result that was being put in place.

    >>> tidy(Path("runs/out")) is None
    True

    Args:
        out: the result.

    Returns:
        The job whose complete result `out` is, if the run was killed before its work folder was removed; else None.

    Raises:
        MoqaError: if another process is writing the result.
    """
    record, old = beside(out, PLACED), beside(out, REPLACED)
    with writing(out):
        if not record.exists() and not old.exists():
            return None
    with _locked(folder_beside(out), out):
        note = _read(record)
        files = note["files"].items() if note is not None and out.is_dir() else ()
        if files and all(_digest(out / path) == digest for path, digest in files):
            _clear(out)
            return note["job"] if note else None
        if not out.exists() and old.exists():
            old.rename(out)
            sync(out.parent)
        record.unlink(missing_ok=True)
        if not (folder_beside(out) / _JOB).exists():
            _clear(out)
    return None


def folder_beside(out: Path) -> Path:
    """The work folder of `out` until it is complete."""
    return beside(out, PARTIAL)


def as_json(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as it is read again."""
    return json.loads(json.dumps(job))


def _clear(out: Path) -> None:
    """Remove the work folder and what was replaced; the record of the result goes last."""
    shutil.rmtree(folder_beside(out), ignore_errors=True)
    if out.exists():
        shutil.rmtree(beside(out, REPLACED), ignore_errors=True)
    beside(out, PLACED).unlink(missing_ok=True)


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
    """The lock of a work folder, made if it is missing; held until it is closed or the process ends."""
    while True:
        with writing(out):
            folder.mkdir(parents=True, exist_ok=True)
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


def _holds(lock: IO[str], folder: Path) -> bool:
    """Whether the folder's lock file is still this one."""
    path = folder / _LOCK
    return path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def _removed(out: Path, folder: Path) -> MoqaError:
    return MoqaError(f"{out} could not be written: somebody removed {folder}", "run the same command again")


def _continued(folder: Path, job: Mapping[str, Any], out: Path, restart: bool) -> ResumableRun:
    """Earlier work on the same job if it is intact, or else an empty folder for this one."""
    work, old = ResumableRun(folder), _read(folder / _JOB)
    if old not in (None, job) and work.begun and not restart:
        key = next(key for key in sorted(old.keys() | job.keys()) if old.get(key) != job.get(key))
        raise MoqaError(
            f"{out} has an unfinished run with {key} {_short(old.get(key))}, this one has {_short(job.get(key))}",
            "finish that one with its own command, or start over with --restart",
        )
    damaged = work.check() if old == job and not restart else _JOB
    if damaged is not None:
        if work.begun and not restart:
            warnings.warn(f"unfinished work on {out} starts over: {damaged} is not as it was written", stacklevel=4)
        (folder / _JOB).unlink(missing_ok=True)
        for path in (folder / _STEPS, folder / _RESULT):
            shutil.rmtree(path, ignore_errors=True)
        work = ResumableRun(folder)
    for path in (folder / _STEPS, folder / _RESULT):
        path.mkdir(exist_ok=True)
    _write(folder / _JOB, job)
    sync(folder.parent)
    return work


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(path: Path) -> str:
    """sha256 of a regular file; empty if there is none."""
    return file_hash(path) if path.is_file() else ""


def _read(path: Path) -> dict[str, Any] | None:
    """A note; None if there is none that is as it was written."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return note["note"] if checksum(note["note"]) == note["checksum"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, note: Mapping[str, Any]) -> None:
    """Write a note with its checksum; it is on the disk when this returns."""
    write_whole(path, json.dumps({"note": note, "checksum": checksum(dict(note))}))
