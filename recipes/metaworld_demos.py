"""Demonstrations by MetaWorld's scripted experts, for ten tasks.

    python recipes/metaworld_demos.py -o runs/vla/demonstrations
    python recipes/metaworld_demos.py -o runs/vla/more --episodes 45 --first-seed 2000 --every 4 --task window-open

Writes one file for each task, see docs/methods/vla.md. An interrupted run goes on with the next task when the same
command is given again.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from moqa.vla.environment import ACTION, ROBOT, TASKS, MetaWorldTask

HORIZON = 8  # actions that belong to an observation
LONGEST = 150  # steps
LARGEST_PUSH, HELD = 0.8, 6  # the arm is pushed off its way, so that there are examples of coming back


def demonstrate(robot: MetaWorldTask, seed: int, every: int) -> dict[str, np.ndarray] | None:
    """Observations along an expert's way, and what it would do from each of them; None if it failed."""
    random = np.random.default_rng([seed, 1])
    robot.reset(seed)
    largest, seen = random.uniform(0, LARGEST_PUSH), []
    for step in range(LONGEST):
        if step % every == 0:
            seen.append((robot.image(), robot.state(), robot.experts(HORIZON)))
        if step % HELD == 0:
            push = random.normal(0, largest, ACTION) * (random.random() < 0.5)
        if robot.step(robot.expert() + push):
            names = "images", "state", "actions"
            return {key: np.stack(values) for key, values in zip(names, zip(*seen, strict=True), strict=True)}
    return None


def write(task: str, options: argparse.Namespace) -> None:
    robot, found, tries = MetaWorldTask(task, options.size), [], 0
    while len(found) < options.episodes:
        one = demonstrate(robot, options.first_seed + tries, options.every)
        if one is not None:
            found.append(one)
        tries += 1
    robot.close()
    tensors = {key: torch.from_numpy(np.concatenate([one[key] for one in found])) for key in found[0]}
    lengths = torch.tensor([len(one["images"]) for one in found])
    tensors["episodes"] = torch.arange(len(found)).repeat_interleave(lengths)
    unfinished = options.out / f"{task}.unfinished"
    save_file(tensors, unfinished, {"robot": ROBOT, "instruction": TASKS[task]})
    unfinished.rename(options.out / f"{task}.safetensors")
    print(f"{task}: {len(found)} of {tries} episodes, {len(tensors['images'])} observations", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--episodes", type=int, default=40, help="of each task")
    parser.add_argument("--size", type=int, default=72, help="pixels of a side")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first episode; rollouts use 10000 and above")
    parser.add_argument("--every", type=int, default=2, help="steps from one observation to the next")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated; all if not given")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for task in options.task or TASKS:
        if not (options.out / f"{task}.safetensors").exists():
            write(task, options)


if __name__ == "__main__":
    main()
