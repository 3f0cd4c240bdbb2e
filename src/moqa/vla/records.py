"""What came of a rollout, as an artifact."""

from math import sqrt

from pydantic import BaseModel, Field, computed_field

from moqa.format.manifest import Length

ROLLOUT = "rollout.json"
# of a normal distribution: 95 % lie within
_Z = 1.959964


class EpisodeRecord(BaseModel, frozen=True):
    """One episode."""

    task: str
    seed: int
    success: bool
    steps: Length
    milliseconds: tuple[float, ...] = Field(description="of each call of the policy")
    crashed: str = Field("", description="what the environment died of; empty if it did not")


class TaskRecord(BaseModel, frozen=True):
    """All episodes of one task."""

    successes: Length
    episodes: Length
    crashed: Length = Field(0, description="episodes whose environment died; they count as failed")

    @computed_field(description="95 % interval of the success rate (Wilson)")  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest plausible success rate."""
        return wilson(self.successes, self.episodes)


class RolloutRecord(BaseModel, frozen=True):
    """All episodes of one policy (`rollout.json`)."""

    moqa: str
    policy: str = Field(description="folder of the original or of the checkpoint")
    fingerprint: str = Field(description="of its files")
    seed: int
    replan: Length = Field(description="actions of a chunk that are done before the policy is asked again")
    tasks: dict[str, TaskRecord]
    milliseconds_per_call: float = Field(description="median time of one call of the policy")
    milliseconds_per_action: float = Field(description="the same, divided by the actions that are done")
    threads: int

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return sum(task.successes for task in self.tasks.values())

    @property
    def episodes(self) -> int:
        """All episodes."""
        return sum(task.episodes for task in self.tasks.values())


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % interval of a rate.

    >>> low, high = wilson(18, 20)
    >>> round(low, 3), round(high, 3)
    (0.699, 0.972)

    Args:
        successes: that were seen.
        episodes: in which; 0 gives the whole range.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not episodes:
        return 0.0, 1.0
    rate, square = successes / episodes, _Z**2
    middle = (rate + square / (2 * episodes)) / (1 + square / episodes)
    half = _Z * sqrt(rate * (1 - rate) / episodes + square / (4 * episodes**2)) / (1 + square / episodes)
    # at 0 and 1, sums of floats may miss the rate itself by their rounding
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))
