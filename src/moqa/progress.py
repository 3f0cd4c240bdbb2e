"""Progress reports of long work, independent of what displays them."""

from typing import Protocol

Fact = float | int | str


class Report(Protocol):
    """A function that work calls to report its progress.

    >>> report("quantize", 3, 24, layer=3, expert=17, experts=64, error=0.0123, tokens=32768)

    Args:
        step: name of the step. Another name, or a smaller `done` than before, begins a new step.
        done: finished pieces of this step.
        total: all pieces of this step, of about equal length: the time left is computed from the last ones.
        facts: current details, never texts of samples. Displays know `layer`, `expert`, `experts` (of the layer),
            `error` (relative error of the step's outputs so far) and `tokens` (processed in the step so far).
    """

    def __call__(self, step: str, done: int, total: int, **facts: Fact) -> None:
        """Report progress."""


def quiet(step: str, done: int, total: int, **facts: Fact) -> None:
    """Report nothing."""
