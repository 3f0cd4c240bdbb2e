"""Demonstrations for `moqa vla profile` from a dataset of lerobot in a local folder, read by lerobot itself.

    python recipes/lerobot_demos.py DATASET -o DEMONSTRATIONS
    python recipes/lerobot_demos.py DATASET -o DEMONSTRATIONS --camera observation.images.wrist --frames 1000

Writes one file for each task, see docs/methods/vla.md. Needs `pip install 'lerobot[dataset]>=0.6'` and Python 3.12.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import save_file

STATE, ACTION, HORIZON = "observation.state", "action", 16


def opened(folder: Path) -> LeRobotDataset:
    """A dataset whose frames have the actions that follow."""
    plain = LeRobotDataset(folder.name, root=folder)
    steps = [step / plain.fps for step in range(HORIZON)]
    return LeRobotDataset(folder.name, root=folder, delta_timestamps={ACTION: steps})


def cameras_of(dataset: LeRobotDataset, wanted: list[str] | None) -> list[str]:
    """The cameras that are asked for, or all, in the order in which a policy has them."""
    there = dataset.meta.camera_keys
    for camera in wanted or ():
        if camera not in there:
            sys.exit(f"--camera {camera} is not in the dataset: it has {', '.join(there) or 'no camera'}")
    return sorted(wanted or there)


def pictures(frame: dict[str, Any], cameras: list[str]) -> torch.Tensor:
    """[height, width, channels of all cameras] uint8."""
    return (torch.cat([frame[camera] for camera in cameras]) * 255).round().byte().movedim(0, -1)


def write(dataset: LeRobotDataset, cameras: list[str], frames: int, out: Path) -> None:
    """One file for each task, of evenly spaced frames."""
    tasks = np.array(dataset.hf_dataset.with_format("numpy")["task_index"])
    for number in np.unique(tasks):
        place = np.flatnonzero(tasks == number)
        chosen = place[np.linspace(0, len(place) - 1, min(frames, len(place))).astype(int)]
        seen = [dataset[int(index)] for index in chosen]
        name = re.sub(r"\W+", "-", seen[0]["task"]).strip("-").lower() or f"task-{number}"
        tensors = {
            "images": torch.stack([pictures(frame, cameras) for frame in seen]).contiguous(),
            "state": torch.stack([frame[STATE].float() for frame in seen]),
            "actions": torch.stack([frame[ACTION].float() for frame in seen]),
            "episodes": torch.stack([frame["episode_index"] for frame in seen]),
        }
        unfinished = out / f"{name}.unfinished"
        save_file(tensors, unfinished, {"robot": dataset.meta.robot_type or "robot", "instruction": seen[0]["task"]})
        unfinished.rename(out / f"{name}.safetensors")
        print(f"{name}: {len(seen)} of {len(place)} frames", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path, help="its folder, with meta, data and videos")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--camera", action="append", help="key of a camera that the policy sees; all if none is given")
    parser.add_argument("--frames", type=int, default=400, help="at most, of each task")
    options = parser.parse_args()
    if not (options.dataset / "meta" / "info.json").is_file():
        sys.exit(f"{options.dataset} is no dataset of lerobot: it has no meta/info.json")
    dataset = opened(options.dataset)
    options.out.mkdir(parents=True, exist_ok=True)
    write(dataset, cameras_of(dataset, options.camera), options.frames, options.out)


if __name__ == "__main__":
    main()
