"""`--adjust auto`: detect drift, and make adjustments from novel text while the server runs."""

import logging
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
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
from moqa.storage.temporary import temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moqa.serve.text import ServedText

_LOG = logging.getLogger(__name__)
# tokens needed for an adjustment: more than its 8 windows, since the ends of texts do not fill a window
MIN_TOKENS = 10 * CONTEXT
MAX_TOKENS = DEFAULT_SAMPLES * CONTEXT  # tokens kept for an adjustment
# pause after an adjustment, as a multiple of its own time: endless text of many kinds must not keep the machine busy
# with adjustments
PAUSE_FACTOR = 10


class _StoppedError(Exception):
    """The server was stopped while an adjustment was being made."""


class AutoAdjusting(Adjusting):
    """Adjustments that are made while the server runs.

    While recent text is novel, requests that name no adjustment get one that was made for similar text. Everything runs
    in the scheduler's thread, except for making an adjustment.

    Args:
        model: the served model.
        tokenizer: tokenizer of the model.
        folder: folder of the checkpoint.
        metrics: metrics of the server.

    Raises:
        MoqaError: if the folder is not a checkpoint, or lacks the routing of known distributions or the channel cache.
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
        self._folder, self._collected = folder, Collected(tokenizer, MAX_TOKENS)
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
        """See `Adjusting`; texts without a requested adjustment are used to detect drift."""
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
        """Cancel an adjustment that is being made."""
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
        """Judge the routing that was counted since the last call."""
        received = not self._results.empty()
        if received:
            self._receive()
        decided = self._watch.count(self._counts.take())
        if received and not decided:
            self._watch.decide()
        if (received or decided) and self._watch.lacks_one:
            self._begin()

    def _begin(self) -> None:
        """Start to make an adjustment, unless one is being made or was just made, or there is too little text."""
        if self._thread is not None or self._collected.tokens < MIN_TOKENS or time.monotonic() < self._not_before:
            return
        self._number += 1
        made = MadeAdjustment(f"auto-{self._number}", self._collected.shares)
        self._thread = threading.Thread(
            target=self._make, args=(made, self._collected.texts()), name="moqa-adjust", daemon=True
        )
        self._collected.clear()
        self._thread.start()

    def _make(self, made: MadeAdjustment, texts: Sequence[str]) -> None:
        """Make an adjustment; runs in its own thread."""

        def report(*_: object, **_facts: object) -> None:
            if self._stopping.is_set():
                raise _StoppedError

        started = time.monotonic()
        try:
            with temporary_folder() as parent:
                out = parent / made.name
                adjust(self._folder, [Distribution(made.name, tuple(texts), "served texts")], out, report=report)
                self._results.put((read_adjustment(out), made, time.monotonic() - started))
        except _StoppedError:
            pass
        except Exception as error:
            # log only where it happened: the message may quote a text
            place = traceback.extract_tb(error.__traceback__)[-1]
            _LOG.error("moqa: no adjustment was made: %s at %s:%s", type(error).__name__, place.filename, place.lineno)
            self._results.put(None)

    def _receive(self) -> None:
        """Take over the adjustment that was made; old ones make room for it."""
        result, self._thread = self._results.get(), None
        if result is None:
            self._metrics.failures.inc()
            return
        adjustment, made, seconds = result
        self._kept.add(adjustment, made)
        self._metrics.adjustment_seconds.set(seconds)
        self._not_before = time.monotonic() + PAUSE_FACTOR * seconds

    def _find(self, asked: str | None) -> Chosen:
        made = self._kept.find(asked)
        return super()._find(asked) if made is None else Chosen(asked, explicit=True, keeps=made)

    def _label(self, chosen: Chosen) -> str:
        # one label for all: the number of names is unlimited
        return NONE if chosen.name is None else "auto"

    @property
    def names(self) -> list[str]:
        """See `Adjusting`."""
        return self._kept.names
