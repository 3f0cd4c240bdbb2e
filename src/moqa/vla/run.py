"""`moqa vla rollout`: how often a policy succeeds, how fast it is, and what it looks like."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moqa import __version__
from moqa.errors import MoqaError
from moqa.originals import folder as original
from moqa.originals.fingerprint import fingerprint
from moqa.progress import Report, quiet
from moqa.registry import check_known
from moqa.storage.artifact import read_json, write_json
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded
from moqa.storage.resumable import ResumableRun, resumable, tidy
from moqa.vla.actor import Actor
from moqa.vla.environment import ACTION, ROBOT, STATE, TASKS, check_renderer
from moqa.vla.episodes import FILMED_EVERY, Episode, Job, RolloutSettings, played
from moqa.vla.records import ROLLOUT, EpisodeRecord, RolloutRecord, TaskRecord

# demonstrations have the seeds below
_FIRST_SEED, _SEEDS = 10_000, 1_000
_LARGER = 2  # pixels of a video for one of an image
_COLOURS = 64


def rollout(
    policy: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    episodes: int = 20,
    seed: int = 0,
    replan: int | None = None,
    processes: int = 1,
    threads: int = 1,
    videos: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
) -> RolloutRecord:
    """Let a policy move MetaWorld's robot, and write success rates, latency and videos to a folder.

    >>> rollout("reference/policy", "runs/rollout", tasks=["drawer-close"], episodes=1).episodes  # doctest: +SKIP
    1

    When a run that was killed is started again, it goes on after the last finished episode.

    Args:
        policy: folder of an original or of a checkpoint.
        out: folder to make.
        tasks: of `moqa.vla.environment.TASKS`.
        episodes: of each task.
        seed: decides where things are in each of them.
        replan: actions of a chunk that are done before the policy is asked again; None means half of the chunk.
        processes: that play episodes at the same time.
        threads: of the policy in each.
        videos: whether the first episode of each task is filmed.
        overwrite: replace what exists at `out`.
        restart: start over, and discard the episodes that an earlier run has finished.
        report: called after each episode.

    Raises:
        MoqaError: if a task is unknown, the policy is for another robot, or nothing can be rendered here.
    """
    out = Path(out)
    for task in tasks:
        check_known("--task", task, TASKS)
    if episodes < 1 or episodes > _SEEDS:
        raise MoqaError(f"--episodes {episodes} cannot be played", f"give 1 to {_SEEDS}")
    check_renderer()
    actor = Actor(policy)
    actor.check(ROBOT, STATE, ACTION)
    steps = max(1, actor.chunk // 2) if replan is None else replan
    if not 1 <= steps <= actor.chunk:
        raise MoqaError(f"--replan {steps} cannot be done", f"{policy} predicts {actor.chunk} actions at once")
    identity = fingerprint(original.locate(policy))
    job = {
        "moqa": __version__, "policy": identity, "tasks": list(tasks), "episodes": episodes, "seed": seed,
        "replan": steps, "threads": threads, "videos": videos,
    }  # fmt: skip
    if tidy(out) == job:
        return read_json(RolloutRecord, out / ROLLOUT)
    check_free(out, overwrite)
    first = _FIRST_SEED + seed * _SEEDS
    wanted = [Job(task, first + n, videos and n == 0) for task in tasks for n in range(episodes)]
    with resumable(out, job, overwrite, restart) as work:
        done = {one: work.done(_step(one)) for one in wanted}
        finished = sum(note is not None for note in done.values())
        todo = [one for one in wanted if done[one] is None]
        settings = RolloutSettings(str(policy), steps, threads)
        report("episodes", finished, len(wanted))
        for number, episode in enumerate(played(settings, todo, processes), finished + 1):
            _keep(work, episode)
            report("episodes", number, len(wanted))
        notes = [EpisodeRecord.model_validate(work.done(_step(one))) for one in wanted]
        record = summary(notes, tasks)
        record = record.model_copy(update={
            "policy": recorded(policy, out), "fingerprint": identity, "seed": seed, "replan": steps, "threads": threads,
            "milliseconds_per_action": record.milliseconds_per_call / steps,
        })  # fmt: skip
        write_json(record, work.result / ROLLOUT)
    return record


def summary(episodes: Sequence[EpisodeRecord], tasks: Sequence[str]) -> RolloutRecord:
    """Counts of some episodes; how they were played is not filled in."""
    of = {task: [one for one in episodes if one.task == task] for task in tasks}
    times = [time for one in episodes for time in one.milliseconds]
    return RolloutRecord(
        moqa=__version__, policy="", fingerprint="", seed=0, replan=0, threads=0,
        tasks={
            task: TaskRecord(
                successes=sum(one.success for one in some), episodes=len(some),
                crashed=sum(bool(one.crashed) for one in some),
            )
            for task, some in of.items()
        },
        milliseconds_per_call=float(np.median(times)) if times else 0.0, milliseconds_per_action=0.0,
    )  # fmt: skip


def write_video(film: NDArray[np.uint8], path: Path) -> None:
    """Write pictures as a GIF that plays in real time.

    Args:
        film: [pictures, height, width, 3].
        path: of the file.

    Raises:
        MoqaError: if pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MoqaError("videos need the package pillow", "pip install 'moqa[vla]', or give --no-videos") from None
    side = film.shape[1] * _LARGER
    images = [Image.fromarray(one).resize((side, side), Image.Resampling.NEAREST).quantize(_COLOURS) for one in film]
    # a step of MetaWorld takes 12.5 ms
    images[0].save(path, save_all=True, append_images=images[1:], duration=max(20, 12.5 * FILMED_EVERY), loop=0)


def _keep(work: ResumableRun, episode: Episode) -> None:
    one = episode.record
    if episode.film is not None:
        write_video(episode.film, work.result / f"{one.task}.gif")
    work.mark_done(_step(Job(one.task, one.seed)), one.model_dump(mode="json"))


def _step(job: Job) -> str:
    return f"{job.task} {job.seed}"
