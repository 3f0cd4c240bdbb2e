"""Speed of a checkpoint or an original model, as a user gets it."""

from moqa.bench.run import Speed, bench
from moqa.callable import callable_folder

__all__ = ["Speed", "bench"]

callable_folder(__name__, bench)
