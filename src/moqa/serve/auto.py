"""`--adjust auto`: detect drift, and make adjustments from novel text while the server runs."""

import logging
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from moqa.adjustment.drift import INTERVAL, STATES, DriftDetector, State
from moqa.adjustment.run import CONTEXT, DEFAULT_SAMPLES, adjust
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.adjustment import Adjustment, read_adjustment
from moqa.format.cache import CACHE_FILES, open_cache
from moqa.format.manifest import MANIFEST, Manifest
from moqa.format.reader import is_checkpoint
from moqa.format.routing import read_routing
from moqa.generation import Piece
from moqa.originals.hub import on_disk
from moqa.runtime.routing import RoutingCounts
from moqa.serve.adjusting import NONE, Adjusting, before_each
from moqa.serve.kept import LoadedAdjustments, MadeAdjustment
from moqa.serve.metrics import Metrics
from moqa.serve.text import Chosen
from moqa.serve.watch import Collected, Watch
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
MAX_CLIENTS = 8  # whose text is watched; each may have some adjustments in memory
IDLE = 600  # seconds without a request after which a client makes room for another


class _StoppedError(Exception):
    """The server was stopped while an adjustment was being made."""


class AutoAdjusting(Adjusting):
    """Adjustments that are made while the server runs, for each client of its own text.

    While a client's recent text is novel, its requests that name no adjustment get one that was made for similar text.
    Everything runs in the scheduler's thread, except for making an adjustment.

    >>> adjusting = AutoAdjusting(model, tokenizer, "runs/out", Metrics())

    Args:
        model: the served model.
        tokenizer: tokenizer of the model.
        folder: folder of the checkpoint.
        metrics: metrics of the server.
        shared: treat all clients as one.

    Raises:
        MoqaError: if the folder is not a checkpoint, or lacks the routing of known distributions or the channel cache.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        folder: str | Path,
        metrics: Metrics,
        shared: bool = False,
    ) -> None:
        super().__init__(model, metrics)
        folder = on_disk(folder, CACHE_FILES)
        if not is_checkpoint(folder):
            raise MoqaError("--adjust auto needs a checkpoint", f"{folder} is an original model")
        fingerprint = read_json(Manifest, folder / MANIFEST).fingerprint
        self._routing = read_routing(folder, fingerprint)
        open_cache(folder, fingerprint)
        self._folder, self._tokenizer, self.by_client = folder, tokenizer, not shared
        self._loaded = LoadedAdjustments(model.adjustments)
        self._watches: dict[str, Watch] = {}
        self._counted: Watch | None = None  # whose tokens are being counted
        self._results: SimpleQueue[tuple[Watch, MadeAdjustment, Adjustment, float] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._begun, self._not_before = 0, 0.0
        metrics.watch(
            lambda: max((watch.detector.state for watch in self._all), key=STATES.index, default="known"),
            lambda: max((watch.detector.divergence for watch in self._all), default=0.0),
        )
        self._counts = RoutingCounts(model)
        self._counts.start()

    @property
    def count(self) -> int:
        """See `Adjusting`."""
        return sum(len(watch.kept) for watch in self._all)

    def drift(self, chosen: Chosen) -> State | None:
        """See `Adjusting`; None for a client whose text is not watched."""
        watch = self._watches.get(self._key(chosen.client))
        return watch.detector.state if watch else None

    def choose(self, asked: str | None, explicit: bool, client: str | None) -> Chosen:
        """See `Adjusting`."""
        watch = self._watches.get(self._key(client))
        if not explicit:
            return replace(watch.default if watch else Chosen(), client=client)
        chosen = self._checked(asked, list(watch.kept) if watch else [])
        return replace(chosen, made=watch.kept.get(asked) if watch and asked else None, client=client)

    def written(self, job: "ServedText", pieces: Iterator[Piece]) -> Iterator[Piece]:
        """See `Adjusting`; texts without a requested adjustment are used to detect drift."""
        asked = job.chosen.explicit and job.chosen.name is not None
        watch = None if asked else self._watch(self._key(job.chosen.client))
        text, read, steps = list[int](), False, 0
        for piece in super().written(job, before_each(pieces, partial(self._count_for, watch))):
            if piece.completion_tokens:  # else they are the prompt's, which are added below
                text += [token.id for token, _ in piece.tokens]
            steps += 1
            # a step may be a chunk of a prompt
            if steps >= INTERVAL or piece.completion_tokens <= 1 or piece.finish:
                steps = 0
                if piece.completion_tokens and not read:
                    text[:0] = job.ids
                    read = True
                self._judge()
                if watch is None or watch.detector.state == "known":
                    text.clear()
                else:
                    watch.collected.take(text, last=piece.finish is not None)
            yield piece

    def close(self) -> None:
        """Cancel an adjustment that is being made."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def _all(self) -> list[Watch]:
        return list(self._watches.values())

    def _key(self, client: str | None) -> str:
        """Whose text it is, as a key of what is watched; empty for a client that is not known."""
        return client or "" if self.by_client else "everyone"

    def _watch(self, key: str) -> Watch | None:
        """What watches a client; None if nothing does: it is not known, or `MAX_CLIENTS` others were here recently."""
        watch = self._watches.get(key)
        if watch is None and key:
            if len(self._watches) >= MAX_CLIENTS:
                idle = min(self._watches, key=lambda other: self._watches[other].used)
                if time.monotonic() - self._watches[idle].used < IDLE:
                    return None
                del self._watches[idle]
            watch = Watch(DriftDetector(self._routing), Collected(self._tokenizer, MAX_TOKENS))
            self._watches[key] = watch
        return watch

    def _count_for(self, watch: Watch | None) -> None:
        """Count for one client from now on."""
        if watch is not self._counted:
            self._count()
            self._counted = watch

    def _count(self) -> None:
        counts = self._counts.take()
        if self._counted is not None:
            self._counted.count(counts)

    def _judge(self) -> None:
        """Judge the routing that was counted since the last call, and make an adjustment if one is needed."""
        self._count()
        if not self._results.empty():
            self._receive()
        self._loaded.drop_unused()
        if self._thread is None and time.monotonic() >= self._not_before:
            self._begin()

    def _begin(self) -> None:
        """Start to make an adjustment for a client that needs one, if there is enough text."""
        lacking = [watch for watch in self._all if watch.lacks_one and watch.collected.tokens >= MIN_TOKENS]
        if not lacking:
            return
        watch = min(lacking, key=lambda one: one.begun)  # in turns
        self._begun += 1
        made, texts = watch.begin(f"made-{self._begun}")
        self._thread = threading.Thread(target=self._make, args=(watch, made, texts), name="moqa-adjust", daemon=True)
        self._thread.start()

    def _make(self, watch: Watch, made: MadeAdjustment, texts: Sequence[str]) -> None:
        """Make an adjustment; runs in its own thread."""

        def report(*_: object, **_facts: object) -> None:
            if self._stopping.is_set():
                raise _StoppedError

        started = time.monotonic()
        try:
            with temporary_folder() as parent:
                out = parent / made.name
                adjust(self._folder, [Distribution(made.name, tuple(texts), "served texts")], out, report=report)
                self._results.put((watch, made, read_adjustment(out), time.monotonic() - started))
        except _StoppedError:
            pass
        except Exception as error:
            # log only where it happened: the message may quote a text
            place = traceback.extract_tb(error.__traceback__)[-1]
            _LOG.error("moqa: no adjustment was made: %s at %s:%s", type(error).__name__, place.filename, place.lineno)
            self._results.put(None)

    def _receive(self) -> None:
        """Take over the adjustment that was made."""
        result, self._thread = self._results.get(), None
        if result is None:
            self._metrics.failures.inc()
            return
        watch, made, adjustment, seconds = result
        self._metrics.adjustment_seconds.set(seconds)
        self._not_before = time.monotonic() + PAUSE_FACTOR * seconds
        if watch in self._all:
            self._loaded.add(adjustment, made)
            watch.keep(made)

    def _label(self, chosen: Chosen) -> str:
        # one label for all: the number of names is unlimited
        return NONE if chosen.name is None else "auto"
