"""Do one thing in the background while the next is prepared."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def background(aside: bool = True) -> Iterator[Callable[..., None]]:
    """A function that makes one call at a time in a thread; leaving the `with` block waits for the last.

    >>> written = []
    >>> with background() as do:
    ...     for layer in range(3):
    ...         do(written.append, layer)
    >>> written
    [0, 1, 2]

    Args:
        aside: whether to use a thread; else the caller waits for each call.

    Raises:
        Exception: what a call raised, at the next one or at the end of the `with` block.
    """
    last: Future[None] = Future()
    last.set_result(None)

    def do(work: Callable[..., None], *arguments: object) -> None:
        nonlocal last
        last.result()
        if aside:
            last = thread.submit(work, *arguments)
        else:
            work(*arguments)

    with ThreadPoolExecutor(1, "moqa-background") as thread:
        yield do
    last.result()
