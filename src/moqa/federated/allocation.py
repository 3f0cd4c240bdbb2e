"""Who trains in which mode, from what clients have told: the six ways that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqa.federated.coarse import Limits, ModeOptions
from moqa.federated.modes import FULL, Allocation, Kind
from moqa.federated.records import ClientRecord
from moqa.federated.skew import skews


@dataclass(frozen=True)
class Choice:
    """A mode and the bits of its updates.

    >>> str(Choice("qat", 3))
    'qat'
    """

    kind: Kind
    upload: int

    def __str__(self) -> str:
        return self.kind


def choices_of(allocation: Allocation, uploads: Sequence[int]) -> tuple[Choice, ...]:
    """What clients may be told to do.

    >>> [choice.kind for choice in choices_of("coarse", [3])]
    ['ptq', 'qat']
    """
    if allocation == "fp":
        return (Choice("fp", FULL),)
    kinds: tuple[Kind, ...] = ("ptq", "qat")
    if allocation in ("ptq", "qat"):
        kinds = ("ptq",) if allocation == "ptq" else ("qat",)
    return tuple(Choice(kind, bits) for kind in kinds for bits in uploads)


def features_of(clients: Sequence[ClientRecord]) -> NDArray[np.float64]:
    """[clients, 4] speed, skew, share of the samples and damage of rounding, each about 1 in size or less."""
    per_sample = np.array([client.per_sample["fp"] for client in clients])
    samples = np.array([client.samples for client in clients], float)
    speed = np.log(per_sample / np.median(per_sample))
    own = skews(_table(clients))
    return np.stack([speed, own, samples / samples.mean(), [min(client.damage, 1.0) for client in clients]], 1)


def options_of(
    clients: Sequence[ClientRecord], choices: Sequence[Choice], sizes: Sequence[int], link: float | None
) -> ModeOptions:
    """What every choice is expected to bring and take, before anything was tried.

    A round of QAT brings a client's share of the samples. PTQ brings less by the damage of rounding on the client's
    data, and on skewed data by up to half more: errors that others do not share are not averaged away. An update in
    b bits loses 4^(1 - b) of it.

    Args:
        clients: as they have described themselves.
        choices: modes and bits.
        sizes: bytes of both messages, by choice.
        link: bytes per second; None if it is not known, and messages are taken to be free.
    """
    samples = np.array([client.samples for client in clients], float)
    skew = skews(_table(clients))
    damage = np.array([min(max(client.damage, 0.0), 1.0) for client in clients])
    latency = np.array([client.latency for client in clients])
    gains, seconds = [], []
    for choice, size in zip(choices, sizes, strict=True):
        kept = (1 - damage) * (1 - skew / 2) if choice.kind == "ptq" else np.ones(len(clients))
        gains.append(samples / samples.sum() * kept * (1 - 4.0 ** (1 - choice.upload)))
        each = np.array([client.per_sample[choice.kind] for client in clients])
        seconds.append(each * samples + latency + (size / link if link else 0.0))
    return ModeOptions(np.stack(gains, 1), np.stack(seconds, 1), np.tile(np.array(sizes, np.int64), (len(clients), 1)))


def first_choice(allocation: Allocation, options: ModeOptions, limits: Limits, seed: int) -> NDArray[np.int64]:
    """[clients] choice of the first round.

    Args:
        allocation: one of the six ways; `random-hybrid` gives QAT to as many clients as `coarse` does, by lot.
        options: of all clients.
        limits: of a round; where all clients do the same, only bytes count.
        seed: of the lot.
    """
    alike = allocation in ("fp", "ptq", "qat")
    found = options.choose(Limits(np.inf, limits.bytes) if alike else limits)
    return np.random.default_rng(seed).permutation(found) if allocation == "random-hybrid" else found


def _table(clients: Sequence[ClientRecord]) -> NDArray[np.float64]:
    classes = max((len(client.histogram) for client in clients), default=0)
    return np.stack([np.pad(client.histogram, (0, classes - len(client.histogram))) for client in clients])
