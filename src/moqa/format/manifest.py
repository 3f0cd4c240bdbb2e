"""The manifest of a checkpoint (`moqa.json`): what it was made from, how, and what each of its files contains."""

import base64
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, field_validator

from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH

# 3 is written of nested widths, 2 where a unit has codes of levels, else 1, which earlier versions read too
FORMAT = 3
MANIFEST, CONFIG = "moqa.json", "config.json"
# for people: it may be edited, so no hash of it is recorded
CARD = "README.md"

Length = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]


def format_of(schemes: Iterable[Scheme], nested: bool) -> int:
    """Number of the oldest format that has some schemes, and nested widths if there are any.

    >>> format_of([Scheme(width=4)], False), format_of([Scheme(width=2, encoding="trellis")], False)
    (1, 2)
    """
    return 3 if nested else 2 if any(scheme.is_coded for scheme in schemes) else 1


class StoredUnit(BaseModel, frozen=True):
    """One unit as it was quantized."""

    layer: int = Field(ge=0)
    role: str
    shape: tuple[Side, Side] = Field(description="(out, in)")
    scheme: Scheme
    method: str = Field(
        description="the method whose result is stored; `gptq` falls back to `rtn` where that is better"
    )
    error: float | None = Field(
        description="squared output error over squared output on held-out samples; None: no data"
    )

    @field_validator("scheme")
    @classmethod
    def _is_of_checkpoints(cls, scheme: Scheme) -> Scheme:
        if scheme.is_foreign:
            raise ValueError(f"encoding {scheme.encoding} is one of files for llama.cpp, not of checkpoints")
        return scheme


class NarrowUnit(BaseModel, frozen=True):
    """One unit at a narrower width; its layer, role and shape are those of the unit."""

    method: str = Field(description="as of the unit")
    error: float | None = Field(description="as of the unit")


class StoredTensor(BaseModel, frozen=True):
    """A tensor that is not a unit."""

    dtype: str
    shape: tuple[Length, ...]


class StoredFile(BaseModel, frozen=True):
    """A weight file."""

    bytes: int
    sha256: str


class NarrowWidth(BaseModel, frozen=True):
    """A narrower width of a nested checkpoint: a bit for each weight, and scales of its own."""

    units: dict[str, NarrowUnit] = Field(description="all that are not kept in 16 bits")
    files: dict[str, StoredFile] = Field(description="one per layer")


class Fitted(BaseModel, frozen=True):
    """Identifies a text that a fitting step saw, so that no evaluation runs on it."""

    digest: str = Field(description="sha256 of the whole text that was given")
    shingles: str = Field(description="content hashes of the samples: little-endian uint64, base64")

    @classmethod
    def of(cls, digest: str, hashes: np.ndarray) -> "Fitted":
        """Record of a text's digest and the hashes of its samples."""
        return cls(digest=digest, shingles=base64.b64encode(hashes.astype("<u8").tobytes()).decode())

    def hashes(self) -> np.ndarray:
        """[hashes] uint64 of the samples."""
        return np.frombuffer(base64.b64decode(self.shingles), "<u8").astype(np.uint64)


class Recovery(BaseModel, frozen=True):
    """A training of scales, zero-points and small tensors after quantization (`moqa.recover`)."""

    steps: int = Field(ge=0, description="of the optimizer; of each block, if they were trained one after the other")
    blockwise: bool = Field(
        default=False, description="whether blocks were trained one after the other, and not the whole model"
    )
    before: float = Field(description="KL divergence from the original on samples that were held out from the training")
    after: float = Field(description="the same at its end")
    kept: bool = Field(description="whether its result is stored; else it was not better")
    optimizer: str = Field(
        "adamw", description="that took the steps, if not the usual one", exclude_if=lambda name: name == "adamw"
    )
    weights: bool = Field(
        default=False, description="whether integers were trained, too", exclude_if=lambda flag: not flag
    )
    input_bits: int | None = Field(
        None, description="of inputs while it was trained, if they were rounded", exclude_if=lambda bits: bits is None
    )
    kv_bits: int | None = Field(
        None, description="of keys and values while it was trained, if they were rounded",
        exclude_if=lambda bits: bits is None,
    )  # fmt: skip
    rate: float | None = Field(
        None, description="of learning, if not the usual one", exclude_if=lambda rate: rate is None
    )
    routing_before: float | None = Field(
        None, description="share of the experts of a token, on these samples, that are its experts in the original, too"
    )
    routing_after: float | None = Field(None, description="the same at the end; null without routed experts")

    @property
    def is_in_the_loop(self) -> bool:
        """Whether integers were trained, inputs or the cache rounded, or the rate was another."""
        return self.weights or any(chosen is not None for chosen in (self.input_bits, self.kv_bits, self.rate))


class Candidates(BaseModel, frozen=True):
    """What a plan could choose from, as the user asked for it."""

    group_size: int | None = Field(
        None, description="of the profile; null: written before plans mixed group sizes", exclude_if=lambda g: g is None
    )
    symmetric: bool | None = Field(
        None, description="of the profile; null as for group_size", exclude_if=lambda flag: flag is None
    )
    widths: tuple[int, ...] | None = Field(
        None, description="candidate widths, if they are not the default ones", exclude_if=lambda widths: widths is None
    )
    fixed: dict[str, int] = Field(
        {}, description="pattern of unit names -> width that the user chose", exclude_if=lambda fixed: not fixed
    )
    encodings: tuple[str, ...] | None = Field(
        None, description="candidate encodings, if not the default ones", exclude_if=lambda names: names is None
    )
    groups: tuple[int, ...] | None = Field(
        None, description="candidate group sizes, if not all of the profile", exclude_if=lambda sizes: sizes is None
    )
    floors: dict[str, int] | None = Field(
        None, description="role -> smallest width of its units, if given", exclude_if=lambda floors: floors is None
    )


class Manifest(Candidates, frozen=True):
    """Table of contents of a checkpoint."""

    format: int = Field(1, description="2 if a unit is stored as codes of levels, 3 with nested widths")
    moqa: str = Field(description="version that wrote it")
    model: str = Field(
        description="the original model, as the user gave it; an absolute path relative to the checkpoint"
    )
    model_type: str
    fingerprint: str = Field(description="of the original model")
    layers: int = Field(ge=0, description="decoder layers")
    strategy: str
    options: dict[str, str | float | int | None] = Field(description="of the strategy")
    ties: str
    budget: str | None
    method: str = Field(description="quantization method")
    seed: int
    mixture: dict[str, float] = Field(
        description="share of each distribution in the fit; `self` is the model's own text"
    )
    fitted: dict[str, Fitted] = Field(description="texts that the plan or the method saw")
    units: dict[str, StoredUnit]
    kept: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    nested: dict[Annotated[int, Field(ge=1, lt=KEEP_WIDTH)], NarrowWidth] = Field(
        {}, description="narrower widths that the checkpoint can be used at, too", exclude_if=lambda widths: not widths
    )
    left_out: dict[str, int] = Field(
        {},
        description="parts of the original that its model in transformers does not have, such as MTP layers: prefix of "
        "their tensors, and how many values they hold",
        exclude_if=lambda parts: not parts,
    )
    recovery: Recovery | None = Field(
        None, description="training after quantization", exclude_if=lambda record: record is None
    )
    config: str = Field("", description="sha256 of config.json, which says how the model computes with the weights")
    companions: dict[str, StoredFile] | None = Field(
        None, description="every other file that loading uses, such as the tokenizer's; null: written before these"
    )
    checksum: str = Field("", description="sha256 of all other fields; files have their own in `files`")

    @property
    def weight_files(self) -> dict[str, StoredFile]:
        """All weight files, those of narrower widths included."""
        nested = (item for narrow in self.nested.values() for item in narrow.files.items())
        return {**self.files, **dict(nested)}
