"""A policy as a robot uses it: from a picture to a chunk of actions."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.manifest import MANIFEST
from moqa.models.view import open_model
from moqa.originals import folder as original
from moqa.policies.members import adapter_of
from moqa.policies.observation import PolicyInputs
from moqa.runtime.load import load
from moqa.tasks.policy import PolicyReader


class Actor:
    """A policy from its folder: an original, or a checkpoint, whose weights stay packed.

    >>> actor = Actor("reference/policy")
    >>> actor.act(np.zeros((72, 72, 3), np.uint8), np.zeros(4, np.float32), "open the drawer").shape
    (8, 4)

    Args:
        folder: of the policy.

    Attributes:
        milliseconds: of each call so far.
        robot: that the policy is for; empty if it does not say.
        size: pixels of a side of an image.

    Raises:
        MoqaError: if the folder holds no policy.
    """

    def __init__(self, folder: str | Path) -> None:
        place = original.locate(folder)
        if (place / MANIFEST).is_file():
            self.model: Any = load(place)[0]
        else:
            view = open_model(place)
            self.model = view.model
        self._adapter = adapter_of(self.model.config)
        self._reader = PolicyReader(place)
        self._folder, self.milliseconds = str(folder), list[float]()
        self.robot = self._adapter.robot(self.model.config)
        self.size = self._reader.fields.image[1]

    @property
    def chunk(self) -> int:
        """Actions that the policy predicts at once."""
        return self._adapter.actions(self.model.config)[0]

    def check(self, robot: str, state: int, action: int) -> None:
        """Refuse a robot that the policy is not for.

        Raises:
            MoqaError: naming both.
        """
        fields, (_, size) = self._reader.fields, self._adapter.actions(self.model.config)
        if self.robot and self.robot != robot:
            raise MoqaError(f"{self._folder} is a policy for {self.robot}", f"rollouts are of {robot}")
        if (fields.state or state, size) != (state, action):
            what = f"{self._folder} takes states of {fields.state} numbers and gives actions of {size}"
            raise MoqaError(what, f"those of {robot} have {state} and {action}")

    @torch.no_grad()
    def act(self, image: NDArray[np.uint8], state: NDArray[np.float32], instruction: str) -> NDArray[np.float32]:
        """Actions for one observation.

        Args:
            image: [height, width, 3].
            state: [state] of the robot.
            instruction: what to do.

        Returns:
            [chunk, action].
        """
        words = self._reader.ids(instruction)[None]
        begin = time.perf_counter()
        pixels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)[None].float() / 255
        seen = PolicyInputs(pixels, torch.from_numpy(state[: self._reader.fields.state])[None], words)
        actions: Tensor = self._adapter.act(self.model, seen)[0].float()
        self.milliseconds.append(1000 * (time.perf_counter() - begin))
        return np.asarray(actions.numpy())
