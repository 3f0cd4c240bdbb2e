"""Speed of a checkpoint or an original model, as a user gets it."""

from moqa.speed.run import Speed, bench

__all__ = ["Speed", "bench"]
