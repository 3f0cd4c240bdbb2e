"""The manifest of a mixture (`mixture.json`): its variants, its router, and what each of its files is."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from moqa.errors import MoqaError
from moqa.format.manifest import Fitted, StoredFile
from moqa.storage.artifact import check_format, check_signed, file_hash, read_json, signed, write_json

FORMAT = 1
MIXTURE, ROUTER = "mixture.json", "router.safetensors"


class VariantRecord(BaseModel, frozen=True):
    """One variant of a mixture; its folder has its name."""

    kind: Literal["checkpoint", "adjustment"]
    of: str | None = Field(description="of an adjustment: name of its checkpoint")
    checksum: str = Field(description="of the manifest of the checkpoint, or of the adjustment")
    bytes: int = Field(description="of its own weight files")
    loss: dict[str, float] = Field(
        description="by distribution: mean loss of continuations on held-out windows of the router"
    )
    beaten_by: str | None = Field(
        None, description="the variant that is no larger and better on every distribution: this one is no choice"
    )


class RouterRecord(BaseModel, frozen=True):
    """The router of a mixture."""

    kind: str = Field(description="encoder, linear or histogram; se-resnet of images")
    base: str = Field(description="checkpoint whose embedding, or whose routing, it reads")
    features: int = Field(ge=1, le=2**20, description="numbers that it reads of each token; of images, channels")
    choices: tuple[str, ...] = Field(min_length=1, max_length=1024, description="variants, in the order of its outputs")
    threshold: float = Field(ge=0, description="of its confidence; below it, the default variant is used")
    labels: str = Field(description="loss that it was trained by: divergence or likelihood")
    context: int = Field(description="tokens of a window; 1: images")
    windows: dict[str, int] = Field(description="by distribution: windows that it was trained on or checked with")
    usage: dict[str, float] = Field(description="share of the prompts of held-out windows that each choice gets")
    left_out: dict[str, float] = Field(
        {},
        description="by distribution: relative change of the loss, against the best single variant, of what a router "
        "chooses there that was trained without it, at this threshold",
    )
    loss: float = Field(description="of what it chooses, on held-out windows")
    single: float = Field(description="of the best single variant")
    oracle: float = Field(description="of the best variant of each prompt")
    fitted: dict[str, Fitted] = Field(description="texts that it was trained on or checked with")
    file: StoredFile

    @property
    def losses(self) -> str:
        """What its labels are losses of, in words."""
        return f"{self.labels} of {'continuations' if self.context > 1 else 'images'}"


class MixtureAccount(BaseModel, frozen=True):
    """Bytes of a mixture."""

    total: int = Field(description="of all weight files, each counted once, and the router")
    resident: int = Field(description="of the largest checkpoint with its largest adjustment, and the router")
    router: int
    shared: int = Field(description="that variants have in common, and that are stored once")


class MixtureRecord(BaseModel, frozen=True):
    """The content of `mixture.json`."""

    format: int = FORMAT
    moqa: str = Field(description="version that wrote it")
    model: str = Field(description="the original, as the user gave it; an absolute path relative to the mixture")
    model_type: str
    fingerprint: str = Field(description="of the original")
    seed: int
    default: str = Field(description="the best single variant")
    variants: dict[str, VariantRecord] = Field(min_length=1)
    router: RouterRecord
    account: MixtureAccount
    checksum: str = ""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        checkpoints = {name for name, variant in self.variants.items() if variant.kind == "checkpoint"}
        for name, variant in self.variants.items():
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(f"{name} is no name of a folder")
            if (variant.of in checkpoints) != (variant.kind == "adjustment"):
                raise ValueError(f"{name} is of {variant.of}")
        for name in (self.default, *self.router.choices):
            if name not in self.variants:
                raise ValueError(f"there is no variant {name}")
        if self.router.base not in checkpoints:
            raise ValueError(f"the router reads {self.router.base}, which is no checkpoint")
        if self.default not in self.router.choices:
            raise ValueError(f"the default {self.default} is no choice of the router")
        return self

    @property
    def checkpoints(self) -> list[str]:
        """Names of the variants that are whole checkpoints."""
        return [name for name, variant in self.variants.items() if variant.kind == "checkpoint"]


def is_mixture(folder: str | Path) -> bool:
    """Whether a folder holds a mixture."""
    return (Path(folder) / MIXTURE).is_file()


def write_mixture(record: MixtureRecord, folder: Path) -> None:
    """Write the manifest of a mixture, after all of its files."""
    write_json(signed(record), folder / MIXTURE)


def read_mixture(folder: str | Path) -> MixtureRecord:
    """Read the manifest of a mixture; its variants are not checked.

    >>> read_mixture("runs/mix").default  # doctest: +SKIP
    'base'

    Raises:
        MoqaError: if there is none, or it was changed or is of a newer format.
    """
    path = Path(folder) / MIXTURE
    if not path.is_file():
        raise MoqaError(f"{folder} is not a mixture", f"it has no {MIXTURE}")
    record = read_json(MixtureRecord, path)
    check_format(f"{folder} has mixture", record.format, FORMAT)
    check_signed(path, record.checksum)
    return record


def check_router(folder: str | Path, record: MixtureRecord) -> None:
    """Compare the file of a mixture's router with its record.

    Raises:
        MoqaError: if it is missing or another one.
    """
    path = Path(folder) / ROUTER
    if not path.is_file():
        raise MoqaError(f"{folder} lacks {ROUTER}")
    if file_hash(path) != record.router.file.sha256:
        raise MoqaError(f"{path} is not the router of these variants", f"its sha256 differs from that in {MIXTURE}")
