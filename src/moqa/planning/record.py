"""The plan: unit -> scheme, with its byte account."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moqa.format.manifest import Candidates, Length, Side
from moqa.format.scheme import Scheme
from moqa.planning.engines import OWN, Ties

FORMAT = 1
PLAN = "plan.json"  # in the folder of a checkpoint
Objective = Literal["mean", "minimax"]
Scope = Literal["global", "layer"]
Share = Annotated[float, Field(ge=0, le=1)]


class Account(BaseModel, frozen=True):
    """Exact bytes that a plan stores."""

    units: Length = Field(description="planes, scales and zero-points of all units")
    kept: Length = Field(description="tensors that are not units: embeddings, norms, routers, biases")
    headers: Length = Field(description="headers of the weight files")
    weights: Side = Field(description="number of weights in units")
    kept_weights: Length = Field(description="number of values in kept tensors")

    @property
    def checkpoint(self) -> int:
        """Bytes of all weight files."""
        return self.units + self.kept + self.headers

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the units."""
        return self.units * 8 / self.weights

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits per weight of the whole model."""
        return self.checkpoint * 8 / (self.weights + self.kept_weights)


class Gain(BaseModel, frozen=True):
    """Share of the expected divergence that a plan saves, compared with a uniform plan of the same bytes."""

    share: float = Field(description="0.4 means that 60 % are left")
    low: float | None = Field(description="bounds in which it lies with a probability of 95 %, as far as that depends")
    high: float | None = Field(description="on the samples; null if too few were measured")

    def __str__(self) -> str:
        """E.g. 40 % (35 to 45)."""
        between = "" if self.low is None or self.high is None else f" ({100 * self.low:.0f} to {100 * self.high:.0f})"
        return f"{100 * self.share:.0f} %{between}"


class Options(BaseModel, frozen=True):
    """Options of the strategies."""

    hedge: float | None = Field(None, ge=0, le=1, description="share of the model's own text in the objective")
    objective: Objective = Field("mean", description="over the known distributions: their mean or their maximum")
    scope: Scope = Field("global", description="rank the experts of all layers together or layer by layer")
    seed: int = Field(0, description="seed of a random plan")


class Plan(Candidates, frozen=True):
    """A scheme for every unit of one model (`plan.json`)."""

    format: int = FORMAT
    moqa: str
    model: str
    model_type: str
    fingerprint: str = Field(description="fingerprint of the model that the plan is for")
    samples: str = Field("", description="hash of the samples of the mixture; empty in plans of moqa 0.1")
    profile: str = Field(description="folder of the profile, relative to the plan's file; contains the samples")
    strategy: str
    options: Options
    engine: str = Field(OWN, description="that the plan is for", exclude_if=lambda name: name == OWN)
    ties: Ties
    budget: str | None = Field(description="as the user typed it")
    known: tuple[str, ...] = Field(description="distributions that the plan was fitted on")
    mixture: dict[str, Share] = Field(description="share of each distribution in the fit, with the model's own text")
    predicted: dict[str, float] = Field(description="expected KL divergence per token in nats, before any correction")
    gains: dict[str, Gain] = Field(
        {}, description="expected gain over uniform on each distribution", exclude_if=lambda gains: not gains
    )
    gap: float | None = Field(
        None, description="no plan has an objective that is smaller by more than this share; null for plans of a rule"
    )
    account: Account
    units: dict[str, Scheme]

    def __repr__(self) -> str:
        """One line; `units` has all schemes."""
        size = f"{self.account.bits_per_weight:.3f} bits per weight, {self.account.checkpoint} bytes"
        return f"<Plan of {self.model} by {self.label}: {size}, {len(self.units)} units>"

    __str__ = __repr__

    @property
    def label(self) -> str:
        """Short name for tables."""
        hedge = "" if self.options.hedge is None else f" hedge {self.options.hedge:g}"
        return f"{self.strategy}{hedge}"
