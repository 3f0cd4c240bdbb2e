"""All options of `moqa.compress`, with the help texts of the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from moqa.methods.registry import DEFAULT_METHOD, METHODS
from moqa.planning.registry import DEFAULT_STRATEGY, STRATEGIES

if TYPE_CHECKING:
    from moqa.planning.record import Objective, Scope, Ties


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of `moqa.compress`; the metadata of every field contains its help text.

    >>> CompressOptions(method="rtn", samples=128).strategy
    'moqa-budget'
    >>> help_of("widths")
    'candidate widths, comma-separated'

    Values are checked by the step that uses them: `moqa.profile`, `moqa.plan` or `moqa.quantize`.
    """

    strategy: str = field(default=DEFAULT_STRATEGY, metadata=_help("{strategies}"))
    ties: Ties = field(
        default="unit", metadata=_help("what must share a width: unit, expert, layer_projection or layer")
    )
    widths: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8), metadata=_help("candidate widths, comma-separated"))
    hedge: float | None = field(
        default=None, metadata=_help("{hedged}: share of the model's own text in the objective, 0 to 1")
    )
    objective: Objective = field(
        default="mean", metadata=_help("{users}: mean or minimax over the known distributions")
    )
    scope: Scope = field(
        default="global", metadata=_help("{users}: rank experts over all layers (global) or per layer")
    )
    method: str = field(default=DEFAULT_METHOD, metadata=_help("{methods}"))
    profile: Path | None = field(default=None, metadata=_help("profile folder to reuse or make [default: OUT.profile]"))
    samples: int = field(default=64, metadata=_help("windows per distribution to measure"))
    context: int = field(default=256, metadata=_help("tokens of a window"))
    self_samples: int | None = field(
        default=None, metadata=_help("windows that the model writes itself [default: as --samples]")
    )
    group_size: int = field(default=64, metadata=_help("weights that share a scale"))
    symmetric: bool = field(default=False, metadata=_help("grids without a zero-point"))
    cache: str | None = field(default=None, metadata=_help("keep for `moqa adjust`: 1% of the channels, or full"))
    proof: bool = field(default=True, metadata=_help("compare with baselines on held-out text"))
    overwrite: bool = field(default=False, metadata=_help("replace an existing output of moqa"))
    restart: bool = field(default=False, metadata=_help("start again, discarding what an interrupted run has finished"))
    seed: int = field(default=0, metadata=_help("seed of samples, labels, self-written text and random plans"))


DEFAULTS = CompressOptions()
_HELP: dict[str, str] = {option.name: option.metadata["help"] for option in fields(CompressOptions)}


def help_of(name: str) -> str | None:
    """Help text of a field, with the registered strategies and methods filled in; None if there is no such field.

    >>> help_of("method")
    'gptq or rtn'
    """
    text = _HELP.get(name, "")
    words = {
        "{strategies}": lambda: one_of([DEFAULT_STRATEGY, *(n for n in STRATEGIES if n != DEFAULT_STRATEGY)]),
        "{hedged}": lambda: one_of([n for n, member in STRATEGIES.items() if member.hedge is not None]),
        "{users}": lambda: one_of([n for n, member in STRATEGIES.items() if name in member.options]),
        "{methods}": lambda: one_of(list(METHODS)),
    }
    for word, names in words.items():
        if word in text:
            text = text.replace(word, names())
    return text or None


def one_of(names: Sequence[str]) -> str:
    """Join names with commas and a final "or".

    >>> one_of(["uniform", "random", "moqa"])
    'uniform, random or moqa'
    """
    return " or ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])
