"""What a policy sees: pictures, its robot's state and an instruction, as one row of numbers."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyInputs:
    """A batch of observations.

    Attributes:
        images: [batch, channels, height, width] from 0 to 1, float32.
        state: [batch, state] of the robot, in its own units, float32.
        words: [batch, words] token ids of the instruction, int64.
    """

    images: Tensor
    state: Tensor
    words: Tensor


@dataclass(frozen=True)
class Fields:
    """How many numbers of each kind a policy takes.

    >>> fields = Fields((3, 72, 72), state=4, words=6)
    >>> row = fields.row(PolicyInputs(torch.zeros(1, 3, 72, 72), torch.ones(1, 4), torch.ones(1, 6)))
    >>> row.shape, fields.parted(row).words
    (torch.Size([1, 15562]), tensor([[1, 1, 1, 1, 1, 1]]))

    Attributes:
        image: channels, height and width.
        state: of the robot.
        words: of an instruction.
    """

    image: tuple[int, int, int]
    state: int
    words: int

    @property
    def size(self) -> int:
        """Numbers of an observation."""
        return prod(self.image) + self.state + self.words

    def row(self, seen: PolicyInputs) -> Tensor:
        """[batch, size] float32, which holds the ids of any vocabulary."""
        return torch.cat([seen.images.flatten(1), seen.state, seen.words.float()], 1)

    def parted(self, rows: Tensor) -> PolicyInputs:
        """The reverse of `row`."""
        images, state, words = rows.split((prod(self.image), self.state, self.words), 1)
        return PolicyInputs(images.unflatten(1, self.image), state, words.long())
