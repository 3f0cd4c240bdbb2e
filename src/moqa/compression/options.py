"""All options of `moqa.compress`, with the help texts of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moqa.methods.registry import DEFAULT_METHOD, METHODS
from moqa.planning.registry import DEFAULT_ENCODINGS, DEFAULT_STRATEGY, STRATEGIES
from moqa.training.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS

if TYPE_CHECKING:
    from moqa.planning.engines import Ties
    from moqa.planning.record import Objective, Scope

Value = TypeVar("Value")


def _option(default: Value, text: str) -> Value:
    """A field with its help text; names in braces are filled in by `help_of`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of `moqa.compress`; the metadata of every field contains its help text.

    >>> CompressOptions(method="rtn", samples=128).strategy
    'auto'
    >>> help_of("widths")
    'candidate widths, comma-separated'

    `fixed` is pattern -> width and `floors` role -> width, see `moqa.plan`; commands have `--ignore`, `--set` and
    `--floor` for them.
    Values are checked by the step that uses them: `moqa.profile`, `moqa.plan` or `moqa.quantize`.
    """

    strategy: str = _option(DEFAULT_STRATEGY, "{strategies}")
    ties: Ties = _option("unit", "what must share a width: unit, expert, layer_projection or layer")
    widths: tuple[int, ...] = _option((1, 2, 3, 4, 5, 6, 8), "candidate widths, comma-separated")
    encodings: tuple[str, ...] = _option(
        DEFAULT_ENCODINGS, "candidate encodings: int, table, trellis; {mixing} mixes them"
    )
    groups: tuple[int, ...] | None = _option(
        None, "{mixing}: candidate numbers of weights that share a scale: 32, 64, 128, 256 [default: all]"
    )
    floors: Mapping[str, int] | None = field(default=None)
    hedge: float | None = _option(None, "{hedged}: share of the model's own text in the objective, 0 to 1")
    objective: Objective = _option("mean", "{users}: mean or minimax over the known distributions")
    scope: Scope = _option("global", "{users}: rank experts over all layers (global) or per layer")
    fixed: Mapping[str, int] = field(default_factory=dict)
    method: str = _option(DEFAULT_METHOD, "{methods}")
    profile: Path | None = _option(None, "profile folder to reuse or make [default: OUT.profile]")
    samples: int = _option(64, "windows per distribution to measure")
    context: int = _option(256, "tokens of a window")
    self_samples: int | None = _option(None, "windows that the model writes itself [default: as --samples]")
    group_size: int = _option(64, "weights that share a scale")
    symmetric: bool = _option(False, "grids without a zero-point")
    cache: str | None = _option(None, "keep for `moqa adjust`: 1% of the channels, or full")
    recover: str | None = _option(
        None, "then train scales and small tensors, at no bytes: a time such as 15m, or steps such as 300"
    )
    optimizer: str = _option(DEFAULT_OPTIMIZER, "of the training: {optimizers}")
    widths_nested: tuple[int, ...] = _option(
        (), "one checkpoint for several widths, e.g. 2,3,4,8, in place of a budget; `--width` chooses one"
    )
    proof: bool = _option(True, "compare with baselines on held-out text")
    overwrite: bool = _option(False, "replace an existing output of moqa")
    restart: bool = _option(False, "start again, discarding what an interrupted run has finished")
    seed: int = _option(0, "seed of samples, labels, self-written text and random plans")


DEFAULTS = CompressOptions()
_HELP: dict[str, str] = {option.name: option.metadata.get("help", "") for option in fields(CompressOptions)}


def help_of(name: str) -> str | None:
    """Help text of a field, with the names of registered members filled in; None if there is no such field.

    >>> help_of("method")
    'gptq, rtn, gptq-affinity or gptq-plain'
    """
    text = _HELP.get(name, "")
    words = {
        "{strategies}": lambda: one_of([DEFAULT_STRATEGY, *(n for n in STRATEGIES if n != DEFAULT_STRATEGY)]),
        "{hedged}": lambda: one_of([n for n, member in STRATEGIES.items() if member.hedge is not None]),
        "{users}": lambda: one_of([n for n, member in STRATEGIES.items() if name in member.options]),
        "{mixing}": lambda: one_of([n for n, member in STRATEGIES.items() if member.mixes]),
        "{methods}": lambda: one_of(list(METHODS)),
        "{optimizers}": lambda: one_of(list(OPTIMIZERS)),
    }
    for word, names in words.items():
        if word in text:
            text = text.replace(word, names())
    return text or None


def one_of(names: Sequence[str]) -> str:
    """Join names with commas and a final "or".

    >>> one_of(["uniform", "random", "paper"])
    'uniform, random or paper'
    """
    return " or ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])
