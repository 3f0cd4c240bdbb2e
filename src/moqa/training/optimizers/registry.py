"""Optimizers: from gradients to the next values of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.registry import Registry, modules_in

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

DEFAULT_OPTIMIZER = "adamw"


@dataclass(frozen=True)
class OptimizerRule:
    """An optimizer by the name that users type.

    Attributes:
        name: as users type it.
        make: for parameters of any shapes and a learning rate, one or several optimizers of torch that step together.
            What they know is in their `state_dict`, as tensors, numbers and lists of these.
    """

    name: str
    make: Callable[[Sequence[nn.Parameter], float], list[Optimizer]]


# every module in the folder is an optimizer
OPTIMIZERS: Registry[OptimizerRule] = Registry(
    "--optimizer", modules_in("moqa.training.optimizers.members", Path(__file__).with_name("members"))
)
optimizer = OPTIMIZERS.decorator(OptimizerRule)
