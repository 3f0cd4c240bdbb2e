"""`--adjust auto`: watch for drift, and make adjustments from what is novel while the server goes on."""

import logging
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from moqa.adjustment.drift import EVERY, DriftDetector, State
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
from moqa.serve.metrics import Metrics
from moqa.serve.text import Chosen
from moqa.storage.artifact import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moqa.serve.text import ServedText

_LOG = logging.getLogger(__name__)
# more than the 8 windows that an adjustment needs: texts are cut anew, and their ends are left out
ENOUGH, MOST = 10 * CONTEXT, DEFAULT_SAMPLES * CONTEXT
KEPT = 4
# after one was made, this many times its seconds pass before the next: text without end and of many kinds must not
# keep the machine busy with adjustments
PAUSE = 10


class _StoppedError(Exception):
    """The server stops while an adjustment is being made."""


@dataclass(eq=False)
class _Made:
    """An adjustment that was made, and the routing of the text that it is for."""

    name: str
    shares: np.ndarray


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
        self._kept: list[_Made] = []  # the one used last at the end
        self._leaving: list[tuple[str, weakref.ref[_Made]]] = []  # dropped once no text is written with them
        self._results: SimpleQueue[tuple[Adjustment, _Made, float] | None] = SimpleQueue()
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
            if steps >= EVERY or piece.completion_tokens <= 1 or piece.finish:
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
        counts, judged = self._counts.take(), self._detector.judgements
        self._collected.count(counts)
        self._detector.add(counts)
        if received or self._detector.judgements > judged:
            self._decide()

    def _decide(self) -> None:
        """Which adjustment requests get from now on; begins to make one where none fits."""
        state = self._detector.state
        if state == "known":
            self._collected.clear()
            self._default = Chosen()
        elif state == "novel":
            fitting = min(self._kept, key=self._distance, default=None)
            if fitting is not None and self._distance(fitting) < self._detector.threshold:
                self._collected.clear()
                if self._default.keeps is not fitting:
                    self._default = Chosen(fitting.name, keeps=fitting)
                    self._kept.remove(fitting)
                    self._kept.append(fitting)
            else:
                self._default = Chosen()
                if self._thread is None and self._collected.tokens >= ENOUGH and time.monotonic() >= self._not_before:
                    self._begin()

    def _distance(self, made: _Made) -> float:
        return self._detector.distance(made.shares)

    def _begin(self) -> None:
        self._number += 1
        made = _Made(f"auto-{self._number}", self._collected.shares)
        self._thread = threading.Thread(
            target=self._make, args=(made, self._collected.texts()), name="moqa-adjust", daemon=True
        )
        self._collected.clear()
        self._thread.start()

    def _make(self, made: _Made, texts: Sequence[str]) -> None:
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
        assert self._held is not None
        self._held.hold(adjustment, made.name)
        self._metrics.adjustment_seconds.set(seconds)
        self._not_before = time.monotonic() + PAUSE * seconds
        self._kept.append(made)
        if len(self._kept) > KEPT:
            oldest = self._kept.pop(0)
            self._leaving.append((oldest.name, weakref.ref(oldest)))
            del oldest
        self._drop_unused()

    def _drop_unused(self) -> None:
        assert self._held is not None
        for name, made in self._leaving.copy():
            if made() is None:
                if self._held.current == name:
                    self._held.switch(None)
                self._held.drop(name)
                self._leaving.remove((name, made))

    def _find(self, asked: str | None) -> Chosen:
        made = next((made for made in self._kept.copy() if made.name == asked), None)
        return super()._find(asked) if made is None else Chosen(asked, explicit=True, keeps=made)

    def _label(self, chosen: Chosen) -> str:
        # their names have no end
        return NONE if chosen.name is None else "auto"

    @property
    def names(self) -> list[str]:
        """See `Adjusting`."""
        return [made.name for made in self._kept.copy()]
