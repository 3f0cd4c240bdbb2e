"""Updates as integers of one grid that all clients share, so that a sum of integers is the sum of the updates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqa.errors import MoqaError
from moqa.federated.updates import Packing, State, UpdateError, differences

# where a tensor is not packed, and for everything before a sum has told how large updates are
_FINE = 16
# steps of the best uniform grid of 2^bits - 1 levels for a normal distribution, in standard deviations:
# Max, Quantizing for minimum distortion (IRE Trans. Inf. Theory 1960), table II
_STEPS = {2: 1.224, 3: 0.6508, 4: 0.3534, 8: 0.0308}
_WIDEST = 8.0  # standard deviations that 16 bits reach to
_LOG = 2.0**-8  # step of the logarithms of sizes
_LEAST = 2.0**-100


@dataclass(frozen=True)
class CommonGrid:
    """How updates travel under masks: as integers whose sum over all clients fits.

    >>> grid = CommonGrid({"w": torch.zeros(64, 32)}, bits=3, clients=10, steps={"w": 0.5})
    >>> grid.widths  # 7 levels of each of 10 clients: a sum below 61
    (6, 20)
    >>> update = {"w": torch.full((64, 32), 1.2)}
    >>> total = sum(grid.integers(update).astype(np.uint32) for _ in range(10))
    >>> grid.mean(total, clients=10, weight=10.0)["w"][0, 0]
    tensor(1.)

    Attributes:
        like: tensors with the names, shapes and dtypes of the model.
        bits: of the matrices that `Packing` packs; other tensors have 16.
        clients: that may be in a sum: a number takes log2 of them more bits than it has.
        steps: of the grid of every tensor, the same for all clients; none yet for the first sum, which is fine for all.
        share: by which this client multiplies its update: its samples over those of the mean client.
    """

    like: Mapping[str, Tensor]
    bits: int
    clients: int
    steps: Mapping[str, float]
    share: float = 1.0

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Bits of a number on the wire: of packed tensors, and of all others."""
        few, fine = ((2 * _most(bits) * self.clients).bit_length() for bits in (self.bits, _FINE))
        return few, fine

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is sent in few bits."""
        return bool(self.steps) and self.bits < _FINE and Packing(self.like, self.bits).is_packed(name)

    @cached_property
    def order(self) -> tuple[list[str], list[str]]:
        """Names of the tensors in few bits and of the others."""
        return [n for n in self.like if self.is_packed(n)], [n for n in self.like if not self.is_packed(n)]

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Numbers of both kinds; behind the fine ones stand logarithms of the sizes of all tensors."""
        few, fine = (sum(self.like[name].numel() for name in names) for names in self.order)
        return few, fine + len(self.like)

    @cached_property
    def length(self) -> int:
        """Bytes of every message."""
        return sum(math.ceil(count * width / 8) for count, width in zip(self.counts, self.widths, strict=True))

    def integers(self, values: Mapping[str, Tensor]) -> NDArray[np.uint32]:
        """Numbers of an update, from 0, and of the sizes of its tensors."""
        parts = [self._numbers(name, values[name]) for names in self.order for name in names]
        sizes = [max(float(values[name].detach().float().square().mean().sqrt()), _LEAST) for name in self.like]
        most = _most(_FINE)
        logs = np.clip(np.round(np.log2(sizes) / _LOG), -most, most) + most
        return np.concatenate([*parts, logs]).astype(np.uint32)

    def sent(self, numbers: NDArray[np.uint32]) -> State:
        """What the numbers of an update say of it."""
        return self._values(numbers.astype(np.int64), 1)

    def mean(self, total: NDArray[np.uint32], clients: int, weight: float) -> State:
        """The mean update from a sum.

        Args:
            total: sum of the numbers of all clients; bits above those of a sum are not looked at.
            clients: in the sum.
            weight: sum of their shares.
        """
        found = {name: value / weight for name, value in self._values(self._cut(total), clients).items()}
        return {
            name: value if self.like[name].is_floating_point() else value.round().to(self.like[name].dtype)
            for name, value in found.items()
        }

    def next_steps(self, total: NDArray[np.uint32], clients: int) -> dict[str, float]:
        """Steps for the next round, from the geometric mean of the sizes of this round's updates."""
        logs = self._cut(total)[-len(self.like) :] - clients * _most(_FINE)
        sizes = dict(zip(self.like, 2.0 ** (logs * _LOG / clients), strict=True))
        packing = Packing(self.like, self.bits)
        return {
            name: float(size)
            * (_STEPS[self.bits] if packing.is_packed(name) and self.bits < _FINE else _WIDEST / _most(_FINE))
            for name, size in sizes.items()
        }

    def pack(self, numbers: NDArray[np.uint32]) -> bytes:
        """Numbers as bytes, each with as many bits as a sum has."""
        return b"".join(
            np.packbits((part[:, None] >> np.arange(width, dtype=np.uint32)) & 1).tobytes()
            for part, width in zip(np.split(numbers, [self.counts[0]]), self.widths, strict=True)
        )

    def unpack(self, data: bytes) -> State:
        """Numbers of bytes that another party sent, as the one tensor `masked` [numbers] int64.

        Raises:
            UpdateError: if it is another number of bytes.
        """
        if len(data) != self.length:
            raise UpdateError(f"{len(data):,} bytes instead of {self.length:,}")
        parts, start = [], 0
        for count, width in zip(self.counts, self.widths, strict=True):
            end = start + math.ceil(count * width / 8)
            bits = np.unpackbits(np.frombuffer(data[start:end], np.uint8), count=count * width)
            parts.append(bits.reshape(count, width) @ (1 << np.arange(width, dtype=np.int64)))
            start = end
        return {"masked": torch.from_numpy(np.concatenate(parts))}

    def _cut(self, total: NDArray[np.uint32]) -> NDArray[np.int64]:
        parts = np.split(total.astype(np.int64), [self.counts[0]])
        return np.concatenate([part & (2**width - 1) for part, width in zip(parts, self.widths, strict=True)])

    def _numbers(self, name: str, value: Tensor) -> NDArray[np.float64]:
        most = self._limit(name)
        return np.clip(np.round(value.detach().double().flatten().numpy() / self._step(name)), -most, most) + most

    def _values(self, numbers: NDArray[np.int64], clients: int) -> State:
        found, start = State(), 0
        for name in (name for names in self.order for name in names):
            like = self.like[name]
            own = numbers[start : start + like.numel()]
            start += like.numel()
            zero = clients * self._limit(name)
            found[name] = torch.from_numpy((own - zero) * self._step(name)).float().reshape(like.shape)
        return found

    def _limit(self, name: str) -> int:
        """Steps to either side of zero."""
        return _most(self.bits if self.is_packed(name) else _FINE)

    def _step(self, name: str) -> float:
        if not self.like[name].is_floating_point():
            return 1.0
        return max(self.steps[name], _LEAST) if self.steps else 1.0 / _most(_FINE)


def masked_update(
    grid: CommonGrid, before: Mapping[str, Tensor], after: Mapping[str, Tensor], residual: Mapping[str, Tensor]
) -> tuple[NDArray[np.uint32], State]:
    """A client's update as numbers of the common grid, and what they leave of it for the next one.

    >>> grid = CommonGrid({"w": torch.zeros(2)}, bits=2, clients=3, steps={"w": 0.25}, share=2.0)
    >>> _, left = masked_update(grid, {"w": torch.zeros(2)}, {"w": torch.tensor([0.3, 0.0])}, {})
    >>> round(left["w"][0].item(), 3)
    0.05

    Raises:
        MoqaError: if training left a number that is not finite.
    """
    values = {name: value * grid.share for name, value in differences(before, after, residual).items()}
    numbers = grid.integers(values)
    sent = grid.sent(numbers)
    left = {
        name: (value - sent[name]) / grid.share for name, value in values.items() if grid.like[name].is_floating_point()
    }
    return numbers, left


def _most(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def check_bits(bits: int) -> int:
    """Bits of updates under masks: full precision travels as 16.

    Raises:
        MoqaError: if there is no grid of so many bits.
    """
    if bits in _STEPS or bits >= _FINE:
        return min(bits, _FINE)
    raise MoqaError(f"updates of {bits} bits have no common grid", f"give {', '.join(map(str, _STEPS))}")
