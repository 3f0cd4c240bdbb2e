"""How long work tells what it is doing, without knowing who listens."""

from typing import Protocol

Fact = float | int | str


class Report(Protocol):
    """What work calls to tell how far it is.

    >>> report("quantize", layer, depth, layer=layer, expert=17, experts=64, error=0.0123, tokens=32768)

    Args:
        step: what is being done. Another name, or less done than before, begins a new step.
        done: pieces of this step that are done.
        total: pieces of this step, of about equal length: time left is told from the pace of the last ones.
        facts: details of the moment, never texts of samples. Listeners know `layer`, `expert`, `experts` (of the
            layer), `error` (relative error of the step's outputs so far) and `tokens` (processed in the step so far).
    """

    def __call__(self, step: str, done: int, total: int, **facts: Fact) -> None:
        """Tell it."""


def quiet(step: str, done: int, total: int, **facts: Fact) -> None:
    """Report nothing."""
