"""One thing that is done while the next is prepared."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Does one thing after the other, each while its caller goes on; leaving the block waits for the last.

    >>> with Background() as background:
    ...     for layer in layers:
    ...         background.do(write, quantized(layer))

    Args:
        aside: whether the caller goes on meanwhile; else it waits.
    """

    def __init__(self, aside: bool = True) -> None:
        self._aside = aside
        self._thread = ThreadPoolExecutor(1, "moqa-background")
        self._doing: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self._wait()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do something, after what was asked for before.

        Raises:
            Exception: what that raised.
        """
        self._wait()
        if self._aside:
            self._doing = self._thread.submit(work, *arguments)
        else:
            work(*arguments)

    def _wait(self) -> None:
        if self._doing is not None:
            self._doing.result()
