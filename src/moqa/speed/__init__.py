"""Speed of a checkpoint or an original model, measured as a user experiences it."""

from moqa.speed.run import Speed, bench

__all__ = ["Speed", "bench"]
