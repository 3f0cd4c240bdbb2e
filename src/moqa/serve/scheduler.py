"""One thread that owns the model and writes all texts in turns, one token each."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from moqa.generation import Piece
from moqa.serve.metrics import Metrics
from moqa.serve.refusal import RefusalError, stopping
from moqa.serve.text import ServedText


class Scheduler:
    """Slots for texts that are written at the same time, and a bounded queue of waiting texts.

    >>> scheduler = Scheduler(lambda job: moqa.generate(model, tokenizer, job.ids, job.sampling), 4, 256, Metrics())
    >>> scheduler.start()
    >>> scheduler.submit([ServedText([599, 3523], moqa.Sampling(max_tokens=4), deliver=lambda piece: None)])

    Each text is a generator with its own key-value cache and random generator, and every step belongs to a single text:
    a text does not depend on the other texts.

    Args:
        begin: makes the generator of a text; called in the scheduler's thread.
        slots: texts written at the same time.
        queue: texts that may wait.
        metrics: metrics of the server.
    """

    def __init__(
        self, begin: Callable[[ServedText], Iterator[Piece]], slots: int, queue: int, metrics: Metrics
    ) -> None:
        self.begin, self._slots, self._queue, self._metrics = begin, slots, queue, metrics
        self._waiting: deque[ServedText] = deque()
        self._active: list[ServedText] = []
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="moqa-model", daemon=True)
        metrics.slots.set(slots)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.active.set_function(lambda: len(self._active))

    @property
    def room(self) -> int:
        """Texts that fit into slots and queue when both are empty."""
        return self._slots + self._queue

    @property
    def stopping(self) -> bool:
        """Whether new texts are refused because the server stops."""
        return self._deadline is not None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[ServedText]) -> None:
        """Queue texts, all or none.

        Raises:
            RefusalError: 429 if the queue has no room for all of them, 503 if the server stops.
        """
        with self._changed:
            if self.stopping:
                raise stopping()
            if len(self._waiting) + len(self._active) + len(jobs) > self.room:
                message = f"{self._slots} texts are being written and {len(self._waiting)} wait: try again later"
                raise RefusalError(429, message, code="queue_full", headers={"Retry-After": "1"})
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[ServedText]) -> None:
        """Cancel texts that nobody reads any more; finished ones are not affected."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)

    def stop(self, seconds: float) -> None:
        """Refuse new and waiting texts, and end unfinished ones after some seconds; returns at once."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in refused:
            job.deliver(stopping())

    def join(self) -> None:
        """Wait until every text is finished or ended."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._active or self.stopping)
                while self._waiting and len(self._active) < self._slots:
                    self._active.append(self._waiting.popleft())
            if not self._active:
                return
            # those of one variant together: the model is switched once for each, and not for every text
            for job in sorted(self._active, key=lambda job: job.chosen.held or ""):
                if not self._step(job):
                    self._active.remove(job)
                    job.pieces = None  # it refers to the job, and to the memory of its text

    def _step(self, job: ServedText) -> bool:
        """Process one chunk of a prompt or one token; returns whether the text continues."""
        if job.cancelled:
            return False
        if self._deadline is not None and time.monotonic() > self._deadline:
            job.deliver(stopping())
            return False
        start = time.monotonic()
        try:
            if job.pieces is None:
                job.pieces = self.begin(job)
            piece = next(job.pieces)
        except Exception as error:
            # an error ends only this text, the others continue
            job.deliver(error)
            return False
        self._count(job, piece, start)
        if piece.text or piece.tokens or piece.finish:
            job.deliver(piece)
        return piece.finish is None

    def _count(self, job: ServedText, piece: Piece, start: float) -> None:
        now, metrics = time.monotonic(), self._metrics
        metrics.seconds.labels("decode" if piece.completion_tokens > 1 else "prefill").inc(now - start)
        if piece.completion_tokens == job.written:
            return
        if job.written == 0:
            metrics.prompt_tokens.inc(len(job.ids))
            metrics.first_token.observe(now - job.last)
        else:
            metrics.next_token.observe(now - job.last)
        metrics.completion_tokens.inc()
        job.written, job.last = piece.completion_tokens, now
