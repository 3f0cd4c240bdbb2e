"""How long work tells what it is doing, without knowing who listens."""

from collections.abc import Callable

# called with what is done, how much of it, and of how much
Report = Callable[[str, int, int], None]


def quiet(step: str, done: int, total: int) -> None:
    """Report nothing."""
