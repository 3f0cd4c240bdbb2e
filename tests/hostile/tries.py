"""Try mutations of all artifacts in forked workers, and count what comes of each."""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hostile.anything import MUTATIONS, other_kinds_of_files
from hostile.artifacts import Artifact, artifacts, same
from hostile.victim import Victim

TRY_SECONDS = 60  # what takes as long hangs: a try takes a tenth of a second
MEMORY = 4 * 2**30  # beyond what is in use
REFUSED, HARMLESS, FORGED, RAW, DIED, HUNG, WRONG = OUTCOMES = (
    "refused in one line", "harmless", "as its new checksums say", "raw error", "process died", "hang", "wrong result"
)  # fmt: skip
BAD = (RAW, DIED, HUNG, WRONG)
HANG_STATUS = 1  # of `faulthandler`, when it ends a process


def try_one(artifact: Artifact, wanted: object, sound: Path, seed: int, folder: Path) -> tuple[str, str]:
    """Mutate an artifact and use it: the outcome, and a line about it."""
    from moqa import MoqaError

    victim = Victim(sound / artifact.name, folder, f"{artifact.name}:{seed}")
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    mutation(victim)
    sealed = False
    if artifact.seal is not None and mutation is not other_kinds_of_files and victim.random.random() < 0.4:
        with contextlib.suppress(Exception):  # not everything can be made to look sound
            artifact.seal(victim)
            sealed = True
    what = f"{artifact.name}:{seed} {mutation.__name__}{', sealed' if sealed else ''}"
    try:
        found = artifact.use(folder)
        equal = same(found, wanted)
        if not equal:
            artifact.check(folder)
    except MoqaError as error:
        text = str(error)
        return (REFUSED if text.isprintable() and len(text) < 2000 else RAW), f"{what}: {text}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if "/moqa/" in frame.filename), frames[-1])
        text = " ".join(str(error).split())
        return RAW, f"{what}: {type(error).__name__} {text:.150} ({Path(at.filename).name}:{at.lineno} {at.line})"
    if equal:
        return HARMLESS, what
    return (FORGED if sealed else WRONG), what


def run(sound: Path, seeds: list[tuple[str, int]], workers: int = 1) -> list[tuple[str, str, str]]:
    """Kind, outcome and description of every try; a worker that ends is replaced by another for what is left."""
    kinds = {artifact.name: artifact for artifact in artifacts(sound)}
    wanted = {name: kinds[name].use(sound / name) for name in kinds}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    queues = [seeds[start::workers] for start in range(workers)]
    logs = {start: Path(tempfile.mkdtemp()) / "log" for start in range(workers)}
    done: list[tuple[str, str, str]] = []
    alive = {_start(kinds, wanted, sound, queues[n], logs[n], used): n for n in range(workers) if queues[n]}
    while alive:
        process, status = next((ended for pid in alive if (ended := os.waitpid(pid, os.WNOHANG))[0]), (0, 0))
        if not process:
            time.sleep(0.05)
            continue
        number = alive.pop(process)
        lines = logs[number].read_text().splitlines()
        found = [tuple(json.loads(line)) for line in lines]
        done += found
        left = queues[number][len(found) :]
        if left:  # it ended in the middle of the next one
            name, seed = left.pop(0)
            hung = os.WIFEXITED(status) and os.WEXITSTATUS(status) == HANG_STATUS
            done.append((name, HUNG if hung else DIED, f"{name}:{seed} ended its process with status {status}"))
        queues[number] = left
        if left:
            alive[_start(kinds, wanted, sound, left, logs[number], used)] = number
    return done


def _start(kinds: dict, wanted: dict, sound: Path, seeds: list, log: Path, used: int) -> int:
    """Fork a worker; returns its process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        _work(kinds, wanted, sound, seeds, log, used)
        os._exit(0)
    finally:
        os._exit(3)


def _work(kinds: dict, wanted: dict, sound: Path, seeds: list, log: Path, used: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with log.open("w") as file, tempfile.TemporaryDirectory(dir=sound.parent) as parent:
        for name, seed in seeds:
            faulthandler.dump_traceback_later(TRY_SECONDS, exit=True)
            folder = Path(parent) / "case"
            outcome, what = try_one(kinds[name], wanted[name], sound, seed, folder)
            file.write(json.dumps((name, outcome, what)) + "\n")
            file.flush()
            shutil.rmtree(folder)
            faulthandler.cancel_dump_traceback_later()


def counted(done: list[tuple[str, str, str]]) -> dict[str, Counter]:
    """By kind of artifact, how often there was each outcome."""
    found: dict[str, Counter] = {}
    for name, outcome, _ in done:
        found.setdefault(name, Counter())[outcome] += 1
    return found
