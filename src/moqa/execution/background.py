"""Do one thing in the background while the next is prepared."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Runs one call at a time in a thread while the caller continues; leaving the `with` block waits for the last.

    >>> written = []
    >>> with Background() as background:
    ...     for layer in range(3):
    ...         background.do(written.append, layer)
    >>> written
    [0, 1, 2]

    Args:
        aside: whether to use a thread; else the caller waits for each call.
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
        """Run a call, after the previous one has finished.

        Raises:
            Exception: what the previous call raised.
        """
        self._wait()
        if self._aside:
            self._doing = self._thread.submit(work, *arguments)
        else:
            work(*arguments)

    def _wait(self) -> None:
        if self._doing is not None:
            self._doing.result()
