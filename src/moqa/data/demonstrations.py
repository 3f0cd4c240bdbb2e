"""Demonstrations: what a robot saw and what an expert did then, one file for each task."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moqa.data.images import name_and_source
from moqa.data.spacing import evenly_spaced
from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".safetensors"
_FORM = "NAME=FOLDER", "sawyer=runs/vla/demonstrations"
# name -> number of dimensions
_TENSORS = {"images": 4, "state": 2, "actions": 3, "episodes": 1}


@dataclass(frozen=True)
class Demonstrations:
    """A named source of demonstrations by one robot.

    Attributes:
        name: of the distribution.
        files: task -> its file.
        robot: that was moved.
        held_out: whether only the held-out episodes are meant; None means all.
        origin: what the user typed after NAME=.
    """

    name: str
    files: dict[str, Path]
    robot: str
    held_out: bool | None
    origin: str

    @property
    def digest(self) -> str:
        """Hash that identifies the demonstrations: of every file, and of which episodes are meant."""
        digest = hashlib.sha256(f"{self.robot} {self.held_out}\n".encode())
        for task, path in self.files.items():
            digest.update(task.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ObservationSamples:
    """Observations as a policy reads them.

    Attributes:
        name: of the distribution.
        inputs: [observations, numbers] of each (`moqa.policies.observation`), float32.
        actions: [observations, horizon, action] of the expert, float32.
        hashes: [hashes] uint64, sorted and unique: content hashes of the images.
    """

    name: str
    inputs: Tensor
    actions: Tensor
    hashes: np.ndarray


@dataclass(frozen=True, eq=False)
class Episodes:
    """Observations of one task, and what the expert did.

    Attributes:
        instruction: what the robot is told.
        images: [observations, height, width, 3] uint8.
        state: [observations, state] float32.
        actions: [observations, horizon, action] float32, from the observation on.
        episodes: [observations] number of the episode, int64.
    """

    instruction: str
    images: Tensor
    state: Tensor
    actions: Tensor
    episodes: Tensor

    def at(self, chosen: Tensor | np.ndarray) -> Episodes:
        """Some of the observations, by index or mask."""
        import torch

        index = torch.as_tensor(chosen)
        return Episodes(
            self.instruction, self.images[index], self.state[index], self.actions[index], self.episodes[index]
        )


def read_demonstrations(spec: str) -> Demonstrations:
    """List the demonstrations of a folder.

    >>> read_demonstrations("sawyer=runs/vla/demonstrations").robot  # doctest: +SKIP
    'metaworld-sawyer'

    Args:
        spec: NAME=FOLDER of one .safetensors file for each task, as `recipes/metaworld_demos.py` writes it.

    Raises:
        MoqaError: if it is not such a folder, or the files are of several robots.
    """
    name, source = name_and_source(spec, *_FORM)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise MoqaError(
            f"{spec}: {folder} {problem}", "a policy reads a folder with one file of episodes for each task"
        )
    files = {path.stem: path for path in sorted(folder.glob(f"*{_SUFFIX}"))}
    if not files:
        raise MoqaError(f"{spec} holds no demonstrations", f"give a folder with one TASK{_SUFFIX} for each task")
    robots = sorted({_about(spec, path)["robot"] for path in files.values()})
    if len(robots) > 1:
        raise MoqaError(f"{spec} holds demonstrations of {' and '.join(robots)}", "give one folder for each robot")
    return Demonstrations(name, files, robots[0], None, source)


def read_episodes(demonstrations: Demonstrations, task: str) -> Episodes:
    """Read what was seen and done in one task.

    Raises:
        MoqaError: if the file is damaged, or lacks a tensor.
    """
    from safetensors.torch import load_file

    path, spec = demonstrations.files[task], f"{demonstrations.name}={demonstrations.origin}"
    about = _about(spec, path)
    try:
        found = load_file(path)
    except Exception as error:  # safetensors raises its own kinds of errors
        raise MoqaError(f"{spec}: {path} cannot be read", one_line(error)) from None
    for name, dims in _TENSORS.items():
        if name not in found or found[name].dim() != dims or len(found[name]) != len(found["images"]):
            shape = list(found[name].shape) if name in found else "missing"
            raise MoqaError(f"{spec}: {name} of {path} is {shape}", f"{dims} dimensions are needed, observations first")
    episodes = Episodes(about["instruction"], *(found[name] for name in _TENSORS))
    if demonstrations.held_out is None:
        return episodes
    return episodes.at(is_held_out(episodes.episodes) == demonstrations.held_out)


def split_demonstrations(demonstrations: Demonstrations) -> tuple[Demonstrations, Demonstrations]:
    """Hold out one episode of five in every task."""
    return replace(demonstrations, held_out=False), replace(demonstrations, held_out=True)


def is_held_out(episodes: Tensor) -> Tensor:
    """[observations] whether an observation's episode is held out: one in five.

    >>> import torch
    >>> is_held_out(torch.tensor([0, 0, 4, 5]))
    tensor([False, False,  True, False])
    """
    return episodes % 5 == 4


def chosen_of(count: int, available: int, seed: int) -> np.ndarray:
    """Indices of some evenly spaced observations."""
    return evenly_spaced(available, min(count, available), seed)


def content_hashes(images: Tensor) -> np.ndarray:
    """[images] uint64 hashes of the pixels of each.

    >>> import torch
    >>> content_hashes(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).shape
    (2,)
    """
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)


def _about(spec: str, path: Path) -> dict[str, str]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except Exception as error:
        raise MoqaError(f"{spec}: {path} cannot be read", one_line(error)) from None
    lack = next((key for key in ("robot", "instruction") if key not in about), None)
    if lack:
        raise MoqaError(f"{spec}: {path} does not say its {lack}", "write it into the file's metadata")
    return about
