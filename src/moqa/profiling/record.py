"""The profile's table of contents: what was measured, on which model, with which settings."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from moqa.format.manifest import Fitted, Length, Side
from moqa.format.scheme import Scheme
from moqa.format.tiles import BLOCK, LARGEST_GROUP, WIDTHS
from moqa.models.units import Unit

FORMAT = 1
SELF = "self"
# the task of a profile that does not name one
CAUSAL_LM = "causal_lm"

_MOST_LAYERS = 2**10  # as for a `config.json`: what is counted by layer takes as much memory
StoredDtype = Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
OwnText = Literal["drawn", "balanced"]
Width = Annotated[int, Field(ge=WIDTHS[0], le=WIDTHS[-1])]


class UnitRecord(BaseModel, frozen=True):
    """A unit of the profiled model."""

    name: str
    layer: Length
    role: str
    projection: str
    expert: Length | None
    shape: tuple[Side, Side]

    @property
    def weights(self) -> int:
        """Number of weights in the matrix."""
        return self.shape[0] * self.shape[1]

    @classmethod
    def of(cls, unit: Unit) -> "UnitRecord":
        """Record of a unit of a model view."""
        return cls.model_validate(unit, from_attributes=True)


class DistributionRecord(BaseModel, frozen=True):
    """One distribution of a profile."""

    origin: str = Field(description="what the user typed, or how the model was sampled")
    samples: int = Field(description="windows that were measured")
    tokens: int = Field(description="tokens in these windows")
    fitted: Fitted | None = Field(description="None for text that the model wrote itself")


class Settings(BaseModel, frozen=True):
    """What the numbers of a profile depend on, besides the model and the texts."""

    context: int = Field(description="tokens in a window")
    samples: int = Field(description="windows per distribution, at most")
    seed: int = 0
    group_size: int = Field(
        64, ge=BLOCK, le=LARGEST_GROUP, multiple_of=BLOCK,
        description="weights that share a scale in the sensitivity's rounding",
    )  # fmt: skip
    symmetric: bool = Field(False, description="whether that rounding has no zero-point")
    method: str = Field("gptq", description="quantization method whose errors the sensitivity is measured with")
    sensitivity: bool = Field(True, description="whether sensitivity is measured: not all strategies need it")
    own_text: OwnText = Field(
        "drawn", description="how the model writes its own text", exclude_if=lambda how: how == "drawn"
    )

    def scheme(self, width: int) -> Scheme:
        """The profile's own scheme, with which those of other encodings and groups are compared, at some width."""
        return Scheme(width=width, group_size=self.group_size, symmetric=self.symmetric)


class ProfileRecord(BaseModel, frozen=True):
    """Table of contents of a profile folder (`profile.json`)."""

    format: int = FORMAT
    moqa: str
    task: str = Field(CAUSAL_LM, description="what the model is for", exclude_if=lambda task: task == CAUSAL_LM)
    model: str = Field(description="the model as the user gave it; an absolute path relative to the profile")
    model_type: str
    fingerprint: str = Field(description="identifies the model")
    kept: dict[str, tuple[StoredDtype, tuple[Length, ...]]] = Field(
        description="stored dtype and shape of tensors outside units"
    )
    left_out: dict[str, int] = Field(
        {}, description="parts of the model that are not measured: prefix, values", exclude_if=lambda parts: not parts
    )
    layers: Length = Field(le=_MOST_LAYERS)
    top_k: Length = Field(description="experts per token; 0 for a dense model")
    settings: Settings
    widths: tuple[Width, ...] = Field(description="widths of the sensitivity columns")
    others: tuple[Scheme, ...] = Field(
        (), description="columns of `compared`: schemes whose rounding errors are compared with those of the settings'"
    )
    units: tuple[UnitRecord, ...] = Field(description="rows of the sensitivity tables, in this order")
    distributions: dict[str, DistributionRecord]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for width in self.widths:
            self.settings.scheme(width)
        outside = next((unit.name for unit in self.units if unit.layer >= self.layers), None)
        if outside is not None:
            raise ValueError(f"unit {outside} is in none of {self.layers} layers")
        return self
