"""What a client does with precision while it trains: nothing, rounding afterwards, or rounding all along."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.qat import Inputs, prepare

Kind = Literal["fp", "ptq", "qat"]
Allocation = Literal["fp", "ptq", "qat", "random-hybrid", "coarse", "coarse+fine"]
BITS = (8, 4, 3, 2)
FULL = 32


@dataclass(frozen=True)
class LocalMode:
    """How a client trains.

    >>> LocalMode("qat", 3).inputs.bits
    4

    Attributes:
        kind: `fp` trains and sends full precision; `ptq` trains in full precision, for a model that is rounded
            afterwards; `qat` trains with the rounding in every forward pass.
        bits: of weights, 8, 4, 3 or 2; inputs of layers have 8, or 4 with weights of 4 and less. 32 with `fp`.
    """

    kind: Kind
    bits: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise MoqaError(f"mode {self.kind} is unknown", f"known are {', '.join(get_args(Kind))}")
        if self.bits not in ((FULL,) if self.kind == "fp" else BITS):
            works = FULL if self.kind == "fp" else ", ".join(map(str, BITS))
            raise MoqaError(f"{self.bits} bits with mode {self.kind} are not supported", f"give {works}")

    @property
    def scheme(self) -> Scheme | None:
        """How weights are stored; None for full precision."""
        return None if self.kind == "fp" else Scheme(width=self.bits)

    @property
    def inputs(self) -> Inputs:
        """How inputs of layers are rounded."""
        return Inputs(8 if self.bits == 8 else 4)


@contextmanager
def rounded(model: nn.Module, mode: LocalMode, keep: Collection[str] = ()) -> Iterator[nn.Module]:
    """A model that computes as it will when it is stored; afterwards it has its exact weights again.

    >>> model = nn.Linear(64, 8)
    >>> with rounded(model, LocalMode("ptq", 2)):
    ...     len(model.weight[0].unique()) <= 4
    True

    Args:
        model: any torch module.
        mode: with its bits; `fp` leaves the model as it is.
        keep: patterns of module names that are not rounded.

    Raises:
        MoqaError: if the model cannot be rounded, naming the module.
    """
    if mode.scheme is None:
        yield model
        return
    trained = prepare(model, mode.scheme, inputs=mode.inputs, keep=keep)
    try:
        yield model
    finally:
        trained.remove(stored=False)


@contextmanager
def in_mode(model: nn.Module, mode: LocalMode, keep: Collection[str] = ()) -> Iterator[nn.Module]:
    """Train a model in a mode; afterwards it has its exact weights, as the optimizer left them.

    >>> model = nn.Linear(64, 8)
    >>> with in_mode(model, LocalMode("qat", 3)):
    ...     model(torch.ones(1, 64)).sum().backward()

    Make the optimizer inside the `with` block: with `qat` the model has scales and zero-points to train, too.

    Args:
        model: any torch module.
        mode: what to do.
        keep: patterns of module names that are not rounded.

    Raises:
        MoqaError: if the model cannot be rounded, naming the module.
    """
    if mode.kind != "qat":
        yield model
        return
    with rounded(model, mode, keep):
        yield model
