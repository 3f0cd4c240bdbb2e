"""What is known of clients and rounds, as artifacts."""

from pydantic import BaseModel, Field

from moqa.federated.settings import Experiment


class ClientRecord(BaseModel):
    """A client as it has described itself, and what was seen of it since."""

    number: int = Field(description="by which lines name it: that of its data if the node has one, else in order")
    node: int
    samples: int
    per_sample: dict[str, float] = Field(description="seconds of training on one sample, by kind of mode, as it says")
    histogram: list[float]
    damage: float
    latency: float = Field(0.0, description="seconds until it had answered the first question, of the server's clock")
    strikes: int = 0
    excluded: str = Field("", description="why it takes part no more")


class RoundRecord(BaseModel):
    """A finished round; round 0 is what clients have told of themselves."""

    round: int
    modes: dict[int, str] = Field(default_factory=dict, description="by number of the client")
    seconds: float = Field(0.0, description="until the last update was there: of the simulated clock, if there is one")
    real_seconds: float = 0.0
    allocator_seconds: float = 0.0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    refused: list[str] = Field(default_factory=list)
    changes: list[str] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict, description="of the server's own evaluation")


class FederatedRecord(BaseModel):
    """An experiment and what came of it."""

    experiment: Experiment
    rounds: list[RoundRecord]
    final_accuracy: float = Field(description="of the stored model on held-out samples, mean of the last five rounds")
    seconds_to_target: float | None = Field(
        description="of the simulated clock, until two rounds in a row reach the target; None if none do"
    )
    seconds: float = Field(description="of all rounds, of the simulated clock")
    uplink_bytes: int = Field(description="of the messages, everything that they hold")
    downlink_bytes: int
    allocator_seconds: float

    @property
    def best(self) -> RoundRecord:
        """The round with the highest accuracy."""
        return max(self.rounds, key=lambda one: one.metrics["accuracy"])
