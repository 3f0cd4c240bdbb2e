"""Ways to reduce the experts of a block: which experts become one, and which are dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.registry import Registry, modules_in

if TYPE_CHECKING:
    from torch import Tensor

# the best on the reference model (docs/results/uncurl.md)
DEFAULT_REDUCTION = "frequency"
DROPPED = -1


@dataclass(frozen=True)
class Routed:
    """How a block's router treats some tokens.

    Attributes:
        tokens: [experts] tokens that each expert gets, int64.
        correlation: [experts, experts] correlation of the experts' router logits over all tokens, float32.
    """

    tokens: Tensor
    correlation: Tensor


# [experts] index of the new expert of each expert, or DROPPED, for what was seen, a number of experts, and a seed
Rule = Callable[[Routed, int, int], "Tensor"]


@dataclass(frozen=True)
class Reduction:
    """A way to reduce experts; its help is the first line of the rule's docstring.

    Attributes:
        name: as users type it.
        rule: the function that makes the groups.
        is_control: whether it is only for comparisons.
    """

    name: str
    rule: Rule
    is_control: bool = False

    @property
    def help(self) -> str:
        """One line on what it does."""
        return (inspect.getdoc(self.rule) or "").partition("\n")[0]


# every module in the folder is a reduction
REDUCTIONS: Registry[Reduction] = Registry(
    "--by", modules_in("moqa.reduction.members", Path(__file__).with_name("members"))
)
reduction = REDUCTIONS.decorator(Reduction)
