"""What a mixture is made of: its variants, as a YAML file describes them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from moqa.adjustment.modes import MODES
from moqa.errors import MoqaError, one_line
from moqa.format.adjustment import RECORD
from moqa.format.reader import is_checkpoint
from moqa.methods.registry import METHODS
from moqa.planning.budget import Budget, parse_share
from moqa.planning.registry import DEFAULT_STRATEGY, STRATEGIES
from moqa.registry import check_known
from moqa.storage.files import read_text
from moqa.tasks import Task

AUTO = "auto"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class CheckpointVariant(BaseModel, frozen=True, extra="forbid"):
    """A whole checkpoint, quantized for the mixture."""

    known: tuple[str, ...] | None = Field(None, min_length=1, description="distributions to fit on; null: all")
    budget: str | None = Field(None, description="such as 3bpw or 12MiB; null: the mixture's --budget")
    method: str = Field("gptq", description="quantization method")
    strategy: str = Field(DEFAULT_STRATEGY, description="of its plan")
    widths: tuple[int, ...] | None = Field(None, min_length=1, description="candidate widths")
    encodings: tuple[str, ...] | None = Field(None, min_length=1, description="candidate encodings")
    groups: tuple[int, ...] | None = Field(None, min_length=1, description="candidate group sizes")
    hedge: float | None = Field(None, description="share of the model's own text in the objective")
    plan: str | None = Field(None, description="a plan file, in place of all above but the method")

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        more = self.model_fields_set - {"plan", "method"}
        if self.plan is not None and more:
            raise ValueError(f"a plan says all but the method: leave out {', '.join(sorted(more))}")
        return self


class AdjustmentVariant(BaseModel, frozen=True, extra="forbid"):
    """An adjustment of one of the mixture's checkpoints."""

    adjustment: str = Field(description="the distribution that it fits the checkpoint to")
    of: str | None = Field(None, description="name of the checkpoint; null: the first one")
    bytes: str = Field("1%", description="that it may add, as a share of the checkpoint's")
    mode: str = Field("residual", description="as of `moqa adjust`")
    samples: Annotated[int, Field(ge=1)] = Field(64, description="windows of 256 tokens to read")


class MadeVariant(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint or an adjustment that exists already; it is copied into the mixture."""

    folder: str = Field(description="of the checkpoint or the adjustment, relative to the working directory")
    of: str | None = Field(None, description="of an adjustment: name of its checkpoint; null: the first one")


Spec = CheckpointVariant | AdjustmentVariant | MadeVariant
Specs = Mapping[str, Spec]


def read_variants(path: str | Path) -> dict[str, Spec]:
    """The variants that a YAML file describes, by name, in its order.

    >>> _ = Path("variants.yaml").write_text("base: {known: [wiki]}\\npython: {adjustment: python, bytes: 2%}\\n")
    >>> read_variants("variants.yaml")["python"].bytes
    '2%'

    A file has one entry per variant: with `adjustment` it is an adjustment to that distribution, with `folder` one that
    exists already, else a checkpoint (`CheckpointVariant`).

    Raises:
        MoqaError: if the file cannot be read, or an entry has unknown keys or values that cannot be used.
    """
    try:
        found = yaml.safe_load(read_text(Path(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise MoqaError(f"--variants {path} cannot be read", getattr(error, "strerror", None) or "not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise MoqaError(f"--variants {path} is not YAML", one_line(error)) from None
    if not isinstance(found, dict) or not found:
        raise MoqaError(f"--variants {path} names no variant", "give one entry for each: `NAME: {budget: 3bpw}`")
    return {str(name): _spec(path, str(name), entry) for name, entry in found.items()}


def proposed(names: Sequence[str]) -> dict[str, Spec]:
    """The variants of `--variants auto`: one base, fitted on all distributions, and an adjustment to each.

    >>> list(proposed(["wiki", "python"]))
    ['base', 'wiki', 'python']
    """
    base: dict[str, Spec] = {"base": CheckpointVariant()}
    return base | {name if name != "base" else "base-text": AdjustmentVariant(adjustment=name) for name in names}


def check_variants(specs: Specs, names: Sequence[str], budget: str | None, task: Task) -> None:
    """Refuse variants that cannot be made, before anything is.

    >>> from moqa.tasks import find_task
    >>> specs = {"base": CheckpointVariant(), "b": AdjustmentVariant(adjustment="wiki")}
    >>> check_variants(specs, ["wiki"], "3bpw", find_task("causal_lm"))

    Args:
        specs: the variants.
        names: distributions that there are.
        budget: of checkpoints that have none of their own.
        task: of the model.

    Raises:
        MoqaError: naming the first variant that is wrong.
    """
    if len(specs) < 2:
        raise MoqaError(f"a mixture of {len(specs)} variant has nothing to choose from", "give two or more")
    checkpoints = [name for name, spec in specs.items() if is_whole(spec)]
    if not checkpoints:
        raise MoqaError("no variant is a checkpoint", "adjustments need one")
    for name, spec in specs.items():
        where = f"variant {name}"
        if isinstance(spec, CheckpointVariant):
            check_known(f"{where}: method", spec.method, METHODS)
            check_known(f"{where}: strategy", spec.strategy, STRATEGIES)
            for one in spec.known or ():
                check_known(f"{where}: known", one, names)
            wanted = spec.budget or budget
            if wanted is not None:
                Budget.of(wanted)
            elif spec.plan is None and STRATEGIES[spec.strategy].needs_budget:
                raise MoqaError(f"{where} has no budget", "give it one, or --budget for all")
        elif isinstance(spec, AdjustmentVariant):
            if not task.writes_samples:
                raise MoqaError(
                    f"{where} is an adjustment, which no {task.kind} has", "name checkpoints with --variants"
                )
            check_known(f"{where}: adjustment", spec.adjustment, names)
            check_known(f"{where}: mode", spec.mode, MODES)
            parse_share(spec.bytes)
        elif not is_checkpoint(spec.folder) and not (Path(spec.folder) / RECORD).is_file():
            raise MoqaError(f"{where}: {spec.folder} is neither a checkpoint nor an adjustment", "give one of the two")
        of = getattr(spec, "of", None)
        if of is not None:
            check_known(f"{where}: of", of, checkpoints)
        base = specs[of_checkpoint(name, specs)]
        if isinstance(spec, AdjustmentVariant) and (isinstance(base, MadeVariant) or base.plan is not None):  # type: ignore[union-attr]
            raise MoqaError(
                f"{where}: its checkpoint is not planned here",
                "make the adjustment with moqa adjust, and give its folder",
            )


def is_whole(spec: Spec) -> bool:
    """Whether a variant is a checkpoint.

    >>> is_whole(AdjustmentVariant(adjustment="german"))
    False
    """
    return isinstance(spec, CheckpointVariant) or (isinstance(spec, MadeVariant) and is_checkpoint(spec.folder))


def of_checkpoint(name: str, specs: Specs) -> str:
    """Name of the checkpoint that a variant belongs to: itself, or that of an adjustment.

    >>> of_checkpoint("b", {"a": CheckpointVariant(), "b": AdjustmentVariant(adjustment="german")})
    'a'
    """
    spec = specs[name]
    if isinstance(spec, CheckpointVariant) or is_whole(spec):
        return name
    return spec.of or next(other for other, one in specs.items() if is_whole(one))


def _spec(path: str | Path, name: str, entry: Any) -> Spec:
    if not _NAME.fullmatch(name):
        raise MoqaError(f"--variants {path}: {name!r} is no name of a variant", "use letters, digits, '.', '_' and '-'")
    entry = {} if entry is None else entry
    if not isinstance(entry, dict):
        raise MoqaError(f"--variants {path}: {name} is {type(entry).__name__}", "an entry has keys, such as budget")
    kind: type[Spec] = CheckpointVariant
    if "adjustment" in entry:
        kind = AdjustmentVariant
    elif "folder" in entry:
        kind = MadeVariant
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise MoqaError(
                f"--variants {path}: {name} has the unknown key {key}", f"known are {', '.join(kind.model_fields)}"
            ) from None
        raise MoqaError(f"--variants {path}: {name} has {key} {first['input']!r}", first["msg"]) from None
