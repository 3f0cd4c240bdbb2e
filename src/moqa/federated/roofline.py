"""How long training takes on a machine, from what its operations compute and move (the roofline model)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from moqa.federated.modes import Kind

_SIDE, _COPIED, _TRIES = 384, 2**22, 3


@dataclass(frozen=True)
class Machine:
    """What limits a client.

    >>> Machine(flops=2e10, bandwidth=1e10, link=1e6).slower(2).link
    1000000.0

    Attributes:
        flops: floating-point operations per second.
        bandwidth: of memory, bytes per second.
        link: to the server and back, bytes per second.
    """

    flops: float
    bandwidth: float
    link: float

    def slower(self, factor: float) -> "Machine":
        """A machine that computes slower by a factor, behind the same link."""
        return Machine(self.flops / factor, self.bandwidth / factor, self.link)


@dataclass(frozen=True)
class Work:
    """Operations of one training step on one sample, one entry each.

    Attributes:
        flops: that each computes; 0 for what is not a product of matrices or a convolution.
        bytes: that each reads and writes.
    """

    flops: tuple[float, ...]
    bytes: tuple[float, ...]

    def times(self, factor: float) -> "Work":
        """So many times as much of everything."""
        return Work(tuple(x * factor for x in self.flops), tuple(x * factor for x in self.bytes))

    def seconds(self, machine: Machine) -> float:
        """Time per sample: every operation takes as long as its computing or its memory traffic, whichever is longer.

        >>> Work((8e9, 0.0), (1e9, 5e9)).seconds(Machine(flops=4e9, bandwidth=1e9, link=1.0))
        7.0

        Williams, Waterman, Patterson: Roofline (CACM 2009), applied to each operation, as torch runs them one by one.
        """
        pairs = zip(self.flops, self.bytes, strict=True)
        return sum(max(flops / machine.flops, moved / machine.bandwidth) for flops, moved in pairs)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = list[float](), list[float]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        moved = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        # views move nothing
        if not func.is_view and moved:
            counted = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
            self.flops.append(float(counted))
            self.bytes.append(float(sum(tensor.numel() * tensor.element_size() for tensor in moved)))
        return out


def work_of(step: Callable[[], object], samples: int) -> Work:
    """What one training step computes and moves, per sample.

    >>> weight = torch.ones(32, 64, requires_grad=True)
    >>> sum(work_of(lambda: (torch.ones(8, 64) @ weight.T).sum().backward(), samples=8).flops)
    8192.0

    Args:
        step: forward and backward pass and the optimizer's step, on one batch; it is run once.
        samples: in the batch.
    """
    with _Counted() as counted:
        step()
    return Work(tuple(x / samples for x in counted.flops), tuple(x / samples for x in counted.bytes))


def this_machine(link: float) -> Machine:
    """Measure this machine for a few milliseconds: a product of matrices and a copy, the best of three.

    >>> this_machine(link=1e6).flops > 1e6
    True

    Args:
        link: bytes per second, which a client cannot measure alone.
    """
    square, row = torch.ones(_SIDE, _SIDE), torch.ones(_COPIED)
    product = min(_timed(lambda: square @ square) for _ in range(_TRIES))
    copy = min(_timed(row.clone) for _ in range(_TRIES))
    return Machine(2 * _SIDE**3 / product, 2 * _COPIED * 4 / copy, link)


@dataclass(frozen=True)
class SimulatedClock:
    """Time of rounds on machines that are not there.

    >>> work = {"fp": Work((1e6,), (1e5,)), "ptq": Work((1e6,), (1e5,)), "qat": Work((1e6,), (4e6,))}
    >>> clock = SimulatedClock([Machine(flops=1e9, bandwidth=1e9, link=1e6)], work)
    >>> round(clock.seconds(0, "qat", samples=100, bytes_=10_000), 3)
    0.41

    Attributes:
        machines: by number of the client.
        work: of a training step on one sample, by kind of mode.
    """

    machines: "list[Machine]"
    work: dict[Kind, Work]

    def per_sample(self, client: int, kind: Kind) -> float:
        """Seconds of training on one sample."""
        return self.work[kind].seconds(self.machines[client])

    def seconds(self, client: int, kind: Kind, samples: int, bytes_: int) -> float:
        """Of a client's round: training and both ways of its messages."""
        return self.per_sample(client, kind) * samples + bytes_ / self.machines[client].link


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
