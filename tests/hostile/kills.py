"""A job that is killed at every call that changes the disk, what is left is damaged, and the same job runs again.

`python tests/hostile/kills.py FOLDER JOB:DAMAGE:EVERY ...` tries every EVERY-th moment of each job and prints what came
of it.
"""

import json
import os
import pickle
import random
import shutil
import signal
import stat
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.jobs import JOBS, Job, prepare
from long_work import contents as files_of

SECONDS = 300  # what takes as long hangs, on any machine
TRIES = 3


class Moments:
    """Counts the calls that change a folder, keeps what is safe on the disk, and ends the process at one of them.

    Args:
        root: the folder, all of which is safe at the beginning.
        last: number of calls before the process is killed.
        safe: file that what is safe is written to then.
    """

    CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self, root: Path, last: int, safe: Path) -> None:
        self._root, self._left, self._safe = root, last, safe
        self._held: list[int] = []  # open files, whose inode numbers are not used again
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, tuple[int, bool]]] = {}
        for path in (root, *root.rglob("*")):
            self._keep(path)
        for name in self.CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, real):
        def call(*args, **options):
            if self._left == 0:
                self._safe.write_bytes(pickle.dumps((self._root.stat().st_ino, self.folders, self.files)))
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            result = real(*args, **options)
            if name == "fsync":
                self._keep(Path(f"/proc/self/fd/{args[0]}").readlink())
            return result

        return call

    def _keep(self, path: Path) -> None:
        """Note a file's bytes, or a folder's entries, as safe on the disk."""
        inside = path == self._root or self._root in path.parents
        if not inside or not path.exists():
            return
        self._held.append(os.open(path, os.O_PATH))
        if path.is_dir():
            entries = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
            self._held += [os.open(path / name, os.O_PATH) for name in entries]
            self.folders[path.stat().st_ino] = entries
        else:
            self.files[path.stat().st_ino] = path.read_bytes()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Bytes of all files of a folder, and all folders in it."""
    return files_of(folder) | {f"{path.relative_to(folder)}/": None for path in folder.rglob("*") if path.is_dir()}


def lose_power(root: Path, safe: Path) -> None:
    """Leave what is safe on the disk: without entries of folders that were not synced, files that were not emptied."""
    top, folders, files = pickle.loads(safe.read_bytes())
    _emptied(root)

    def build(folder: Path, inode: int) -> None:
        for name, (child, is_folder) in folders.get(inode, {}).items():
            if is_folder:
                (folder / name).mkdir()
                build(folder / name, child)
            else:
                (folder / name).write_bytes(files.get(child, b""))

    build(root, top)


def flip(path: Path, chance: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    """Cut a file off somewhere."""
    os.truncate(path, chance.randrange(path.stat().st_size))


DAMAGES = {"flip": flip, "cut": cut}


def attempt(job: Job, place: Path, log: Path, last: int | None = None) -> int:
    """Run a job in a process of its own, perhaps until a moment: 0, 2 after an error of the user's, -9 if killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if last is not None:
                Moments(place, last, log.with_suffix(".safe"))
            code = _code(job, place)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _code(job: Job, place: Path) -> int:
    from moqa.errors import MoqaError

    try:
        job.run(place)
    except MoqaError as error:
        print(f"moqa: {error}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def outcome(job: Job, place: Path, log: Path, whole: dict[str, bytes]) -> str:
    """Run the same job again: `harmless` or `found` if the result is right in the end, else what is wrong."""
    found = False
    for _ in range(TRIES):
        code, text = attempt(job, place, log), log.read_text(errors="replace")
        same = contents(place) == whole
        if code == 0:
            if same:
                return "found" if found or "starts over" in text else "harmless"
            return f"ACCEPTED WRONG: {sorted(contents(place).items() ^ whole.items())[0][0]}"
        if code != 2 or text.count("moqa: ") != 1:
            return f"RAW ERROR {code}: {text[-600:]}"
        if same and " exists: " in text:
            return "harmless"
        found = True
    return f"NO END: {text[-600:]}"


def visible(folder: Path) -> Iterator[tuple[str, dict[str, bytes] | bytes]]:
    """What other commands would read in a folder."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            yield path.name, contents(path) if stat.S_ISDIR(path.stat().st_mode) else path.read_bytes()


def enumerate_kills(job: Job, root: Path, damage: str, every: int) -> Counter:
    """Kill a job at every so many moments; how often each outcome came.

    Args:
        job: the job.
        root: an empty folder for it.
        damage: `none`, `power`, or for each file of the unfinished work `flip` or `cut`.
        every: distance of two moments.
    """
    place, log, kept = root / "place", root / "log", root / "kept"
    seen: Counter = Counter()
    place.mkdir(parents=True)
    job.before(place)
    old = dict(visible(place))
    assert attempt(job, place, log) == 0, log.read_text()
    whole, new = contents(place), dict(visible(place))
    for number in range(0, 10**6, every):
        _emptied(place)
        job.before(place)
        if attempt(job, place, log, number) == 0:
            return seen
        if damage == "power":
            lose_power(place, log.with_suffix(".safe"))
        for name, content in visible(place):
            whole_one = _without(f".{job.later}.new", content)
            if whole_one not in (old.get(name), new.get(name), _without(job.later, new.get(name))):
                _tell(seen, job, number, f"HALF-WRITTEN: {name}")
        if damage not in DAMAGES:
            _tell(seen, job, number, outcome(job, place, log, whole))
            continue
        shutil.rmtree(kept, ignore_errors=True)
        place.rename(kept)
        hidden = list(kept.glob(".*"))
        unfinished = [path for top in hidden for path in (top, *top.rglob("*")) if path.is_file()]
        for path in unfinished:
            if path.stat().st_size:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(kept, place)
                name = path.relative_to(kept)
                DAMAGES[damage](place / name, random.Random(f"{number} {name}"))
                _tell(seen, job, number, outcome(job, place, log, whole), str(name))
        place.mkdir(exist_ok=True)
    raise AssertionError("the job never ends")


def _without(later: str, content):
    """A folder without a file that is written into it later, under a hidden name until it is complete."""
    return {name: data for name, data in content.items() if name != later} if isinstance(content, dict) else content


def _tell(seen: Counter, job: Job, number: int, what: str, name: str = "") -> None:
    seen[what.split(":")[0]] += 1
    if what[0].isupper():
        print(f"WRONG {job.name}, moment {number} {name}: {what}", flush=True)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(folder: Path, *typed: str) -> None:
    """Prepare what jobs need in a process of its own, so that this one has no threads when it forks."""
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    import moqa.adjustment
    import moqa.compression.run  # noqa: F401  (what every job would import)

    transformers.AutoTokenizer  # noqa: B018
    inputs = folder / "inputs"
    if not inputs.exists():
        assert attempt(Job("prepare", prepare), inputs, folder / "log") == 0, (folder / "log").read_text()
    for name, damage, every in (one.split(":") for one in typed):
        seen = enumerate_kills(JOBS(inputs)[name], folder / f"{name}-{damage}", damage, int(every))
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
