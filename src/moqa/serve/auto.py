"""`--adjust auto`: watch for drift, and make adjustments from what is novel while the server goes on."""

import logging
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moqa.adjustment.drift import INTERVAL, DriftDetector, State
from moqa.adjustment.run import CONTEXT, DEFAULT_SAMPLES, adjust
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.adjustment import Adjustment, read_adjustment
from moqa.format.cache import open_cache
from moqa.format.manifest import MANIFEST, Manifest
from moqa.format.reader import is_checkpoint
from moqa.format.routing import read_routing
from moqa.generation import Piece
from moqa.runtime.routing import RoutingCounts
from moqa.serve.adjusting import NONE, Adjusting
from moqa.serve.collected import Collected
from moqa.serve.kept import KeptAdjustments, MadeAdjustment
from moqa.serve.metrics import Metrics
from moqa.serve.text import Chosen
from moqa.serve.watch import Watch
from moqa.storage.artifact import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moqa.serve.text import ServedText

_LOG = logging.getLogger(__name__)
# more than the 8 windows that an adjustment needs: texts are cut anew, and their ends are left out
ENOUGH, MOST = 10 * CONTEXT, DEFAULT_SAMPLES * CONTEXT
# after one was made, this many times its seconds pass before the next: text without end and of many kinds must not
# keep the machine busy with adjustments
PAUSE = 10


class _StoppedError(Exception):
    """The server stops while an adjustment is being made."""


class AutoAdjusting(Adjusting):
    """Adjustments that are made while the server runs.

    Requests that say nothing get the adjustment whose text is like recent text, while that is novel. All happens in the
    scheduler's thread, but for the making.

    Args:
        model: that writes.
        tokenizer: of the model.
        folder: of the checkpoint.
        metrics: to count in.

    Raises:
        MoqaError: if it is no checkpoint, or lacks the routing of its known distributions or the channel cache.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path, metrics: Metrics
    ) -> None:
        super().__init__(model, metrics)
        folder = Path(folder)
        if not is_checkpoint(folder):
            raise MoqaError("--adjust auto needs a checkpoint", f"{folder} is an original model")
        fingerprint = read_json(Manifest, folder / MANIFEST).fingerprint
        self._detector = DriftDetector(read_routing(folder, fingerprint))
        open_cache(folder, fingerprint)
        self._folder, self._collected = folder, Collected(tokenizer, MOST)
        self._kept = KeptAdjustments(model.adjustments)
        self._watch = Watch(self._detector, self._collected, self._kept)
        self._results: SimpleQueue[tuple[Adjustment, MadeAdjustment, float] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._number, self._not_before = 0, 0.0
        metrics.watch(lambda: self._detector.state, lambda: self._detector.divergence)
        self._counts = RoutingCounts(model)
        self._counts.start()

    @property
    def drift(self) -> State | None:
        """See `Adjusting`."""
        return self._detector.state

    def written(self, job: "ServedText", pieces: Iterator[Piece]) -> Iterator[Piece]:
        """See `Adjusting`; texts for which no adjustment was asked are watched."""
        if job.chosen.explicit and job.chosen.name is not None:
            yield from super().written(job, self._uncounted(pieces))
            return
        text, read, steps = list[int](), False, 0
        for piece in super().written(job, pieces):
            for token, _ in piece.tokens:
                text.append(token.id)
            steps += 1
            # a step may be a chunk of a prompt
            if steps >= INTERVAL or piece.completion_tokens <= 1 or piece.finish:
                steps = 0
                if piece.completion_tokens and not read:
                    text[:0] = job.ids
                    read = True
                self._judge()
                if self._detector.state == "known":
                    text.clear()
                else:
                    self._collected.take(text, last=piece.finish is not None)
            yield piece

    def choose(self, asked: str | None, explicit: bool) -> Chosen:
        """See `Adjusting`."""
        return self._find(asked) if explicit else self._watch.default

    def close(self) -> None:
        """Give up an adjustment that is being made."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _uncounted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        while True:
            self._judge()
            piece = next(pieces, None)
            self._counts.take()
            if piece is None:
                return
            yield piece

    def _judge(self) -> None:
        """Look at what was counted since the last time."""
        received = not self._results.empty()
        if received:
            self._receive()
        decided = self._watch.count(self._counts.take())
        if received and not decided:
            self._watch.decide()
        if (received or decided) and self._watch.lacks_one:
            self._begin()

    def _begin(self) -> None:
        """Make an adjustment, unless one is being made, was made just now, or there is too little text for it."""
        if self._thread is not None or self._collected.tokens < ENOUGH or time.monotonic() < self._not_before:
            return
        self._number += 1
        made = MadeAdjustment(f"auto-{self._number}", self._collected.shares)
        self._thread = threading.Thread(
            target=self._make, args=(made, self._collected.texts()), name="moqa-adjust", daemon=True
        )
        self._collected.clear()
        self._thread.start()

    def _make(self, made: MadeAdjustment, texts: Sequence[str]) -> None:
        """In a thread of its own."""

        def report(*_: object, **_facts: object) -> None:
            if self._stopping.is_set():
                raise _StoppedError

        started = time.monotonic()
        try:
            with TemporaryDirectory(prefix="moqa-") as parent:
                out = Path(parent) / made.name
                adjust(self._folder, [Distribution(made.name, tuple(texts), "served texts")], out, report=report)
                self._results.put((read_adjustment(out), made, time.monotonic() - started))
        except _StoppedError:
            pass
        except Exception as error:
            # neither its message, which may quote a text, nor more than the place
            place = traceback.extract_tb(error.__traceback__)[-1]
            _LOG.error("moqa: no adjustment was made: %s at %s:%s", type(error).__name__, place.filename, place.lineno)
            self._results.put(None)

    def _receive(self) -> None:
        """Hold what was made meanwhile, and drop what is too much."""
        result, self._thread = self._results.get(), None
        if result is None:
            self._metrics.failures.inc()
            return
        adjustment, made, seconds = result
        self._kept.add(adjustment, made)
        self._metrics.adjustment_seconds.set(seconds)
        self._not_before = time.monotonic() + PAUSE * seconds

    def _find(self, asked: str | None) -> Chosen:
        made = self._kept.find(asked)
        return super()._find(asked) if made is None else Chosen(asked, explicit=True, keeps=made)

    def _label(self, chosen: Chosen) -> str:
        # their names have no end
        return NONE if chosen.name is None else "auto"

    @property
    def names(self) -> list[str]:
        """See `Adjusting`."""
        return self._kept.names
