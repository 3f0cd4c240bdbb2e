"""Episodes in processes of their own: one whose environment dies is counted, and the others go on."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from numpy.typing import NDArray

from moqa.errors import MoqaError, one_line
from moqa.vla.actor import Actor
from moqa.vla.environment import STEPS, TASKS, MetaWorldTask
from moqa.vla.records import EpisodeRecord

# steps from one picture of a video to the next
FILMED_EVERY = 6


@dataclass(frozen=True)
class Job:
    """One episode to do.

    Attributes:
        task: name of the task.
        seed: of the episode.
        filmed: whether pictures of it are kept.
    """

    task: str
    seed: int
    filmed: bool = False


@dataclass(frozen=True)
class RolloutSettings:
    """What every episode of a rollout shares.

    Attributes:
        policy: its folder.
        replan: actions that are done before the policy is asked again.
        threads: of the policy.
    """

    policy: str
    replan: int
    threads: int


@dataclass(frozen=True)
class Episode:
    """What came of an episode: the record, and the pictures if it was filmed, [pictures, height, width, 3]."""

    record: EpisodeRecord
    film: NDArray[np.uint8] | None = None


def play(actor: Actor, robot: MetaWorldTask, job: Job, replan: int) -> Episode:
    """Play one episode to its end.

    An exception of the environment ends it as failed; one of the policy is an error of the policy.
    """
    calls, pictures, step, done = len(actor.milliseconds), [], 0, False
    try:
        robot.reset(job.seed)
        while step < STEPS and not done:
            image = robot.image()
            chunk = actor.act(image, robot.state(), TASKS[job.task])
            for action in chunk[:replan]:
                if job.filmed and step % FILMED_EVERY == 0:
                    pictures.append(robot.image())
                done, step = robot.step(action), step + 1
                if done or step >= STEPS:
                    break
        crashed = ""
    except MoqaError:
        raise
    except Exception as error:  # MuJoCo and MetaWorld raise many kinds
        crashed, done = one_line(error) or type(error).__name__, False
    record = EpisodeRecord(
        task=job.task, seed=job.seed, success=done, steps=step, milliseconds=tuple(actor.milliseconds[calls:]),
        crashed=crashed,
    )  # fmt: skip
    return Episode(record, np.stack(pictures) if pictures else None)


def played(settings: RolloutSettings, jobs: Sequence[Job], processes: int) -> Iterator[Episode]:
    """Play episodes in some processes at a time, in the order in which they end.

    Args:
        settings: of all of them.
        jobs: the episodes; those of one task should follow each other.
        processes: that work at the same time.

    Raises:
        MoqaError: if the policy or the renderer cannot be used.
    """
    waiting, context = list(reversed(jobs)), multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[BaseProcess, Job]] = {}

    def begin(worker: tuple[Connection, BaseProcess] | None = None) -> None:
        if not waiting:
            if worker is not None:
                worker[0].send(None)
                worker[1].join()
            return
        if worker is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            worker = ours, process
        job = waiting.pop()
        worker[0].send(job)
        workers[worker[0]] = worker[1], job

    try:
        for _ in range(min(processes, len(jobs))):
            begin()
        while workers:
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                process, job = workers.pop(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:  # the process is dead
                    process.join()
                    crashed = f"the process of the environment ended with {process.exitcode}"
                    yield Episode(
                        EpisodeRecord(
                            task=job.task, seed=job.seed, success=False, steps=0, milliseconds=(), crashed=crashed
                        )
                    )
                    begin()
                    continue
                if isinstance(answer, MoqaError):
                    raise answer
                begin((pipe, process))
                yield answer
    finally:
        for process, _ in workers.values():
            process.terminate()


def _work(pipe: Connection, settings: RolloutSettings) -> None:
    """What a process does: episodes that are sent to it, until None comes."""
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    torch.set_num_threads(settings.threads)
    robots: dict[str, MetaWorldTask] = {}
    try:
        actor = Actor(settings.policy)
        while (job := pipe.recv()) is not None:
            if job.task not in robots:
                for robot in robots.values():
                    robot.close()
                robots = {job.task: MetaWorldTask(job.task, actor.size)}
            pipe.send(play(actor, robots[job.task], job, settings.replan))
    except MoqaError as error:
        pipe.send(error)
    except EOFError:  # nobody waits any more
        pass
