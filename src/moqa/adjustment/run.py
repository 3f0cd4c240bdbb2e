"""`moqa.adjust`: fit a checkpoint to a novel distribution from a few samples, without quantizing it again."""

import time
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, Field

from moqa import __version__
from moqa.adjustment.cached import LayerOriginals
from moqa.adjustment.choose import RULES, Evidence
from moqa.adjustment.measure import measure
from moqa.adjustment.modes import MODES, Change, Situation
from moqa.data import Data, as_distributions, cut_windows
from moqa.errors import MoqaError
from moqa.format.adjustment import Adjustment, AdjustmentRecord, ExpertSizes, layout, sizes_of, write_adjustment
from moqa.format.cache import CACHE_FILES, open_cache
from moqa.format.manifest import Fitted, StoredFile
from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.models.load import read_config
from moqa.originals.hub import on_disk
from moqa.planning.budget import parse_share
from moqa.progress import Report, quiet
from moqa.runtime.load import load_packed
from moqa.storage.folders import check_free
from moqa.tasks import check_language_model
from moqa.tasks.causal_lm import load_tokenizer

DEFAULT_SAMPLES, CONTEXT = 64, 256
# fewer samples do not represent their distribution
MIN_SAMPLES = 8


class Adjusted(BaseModel, frozen=True):
    """The output of `moqa adjust --json`."""

    adjustment: str
    checkpoint: str
    name: str
    mode: str
    rule: str
    samples: int
    tokens: int
    channels: int = Field(description="rows and columns with bits of their own")
    units: int = Field(description="units that replace the checkpoint's")
    bytes: int = Field(description="of the adjustment's weight file")
    extra_bytes: int = Field(description="by which the weights in use grow")
    extra_bytes_percent: float = Field(description="of the checkpoint's bytes")
    divergence: float | None = Field(description="KL divergence on the samples before; None without the whole original")
    expected: float = Field(description="expected decrease of the divergence")
    search_seconds: float = Field(description="from tokens to the file, without loading the checkpoint")


def adjust(
    checkpoint: str | Path,
    data: Data,
    out: str | Path,
    *,
    samples: int = DEFAULT_SAMPLES,
    budget: str | float = "1%",
    mode: str = "residual",
    rule: str = "gain",
    seed: int = 0,
    overwrite: bool = False,
    report: Report = quiet,
) -> Adjusted:
    """Make an adjustment for a novel distribution.

    >>> adjusted = moqa.adjust("runs/out", {"german": "german.txt"}, "runs/german-1", samples=8)
    >>> adjusted.mode, adjusted.extra_bytes_percent <= 1
    ('residual', True)

    Args:
        checkpoint: folder or Hub id of a checkpoint with a channel cache (`moqa.quantize(..., cache="full")`).
        data: one distribution, as distributions or name -> source; no held-out text of an evaluation.
        out: folder to create.
        samples: number of windows of 256 tokens to use.
        budget: bytes that it may add, as a share of the checkpoint's; mode `swap` adds none and takes its bytes from
            units that the samples do not need.
        mode: one of `residual` (1 to 3 bits on top of the packed ones for many channels), `fp16` (16 bits for few),
            `requant` (MoQa's: cached channels of experts whose class changed take the class's width) and `swap`.
        rule: by which channels are chosen: `gain` (ours), `dynamics` (MoQa's) or `random` (the control).
        seed: of the choice of windows, and of random choices.
        overwrite: replace an adjustment that exists at `out`.
        report: called with the name of a step, how much of it is done, and its total.

    Raises:
        MoqaError: if the checkpoint has no cache, or only a part of the original although the mode needs all of it, the
            samples are too few, or the bytes are too few for a channel.
    """
    MODES.find(mode)
    RULES.find(rule)
    parse_share(budget)
    check_free(Path(out), overwrite)
    return Search(checkpoint, data, samples, seed, report).make(out, budget, mode, rule, overwrite)


class Search:
    """Samples of a novel distribution, measured once in a checkpoint, for any number of adjustments.

    >>> search = Search("runs/out", {"german": "german.txt"})  # doctest: +SKIP
    >>> search.make("runs/german-2", "2%")  # doctest: +SKIP
    >>> search.make("runs/german-3", "3%")  # doctest: +SKIP

    Args:
        checkpoint: as for `adjust`.
        data: as for `adjust`.
        samples: as for `adjust`.
        seed: as for `adjust`.
        report: as for `adjust`.

    Raises:
        MoqaError: if the checkpoint has no cache, or the samples are too few.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        data: Data,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
        report: Report = quiet,
    ) -> None:
        self._packed, self._seed, self._report = open_checkpoint(on_disk(checkpoint, CACHE_FILES)), seed, report
        check_language_model(read_config(self._packed.folder, packed=True), checkpoint)
        self._cache = open_cache(self._packed.folder, self._packed.manifest.fingerprint)
        self._sizes = sizes_of(self._packed)
        tokenizer = load_tokenizer(self._packed.folder)
        distributions = as_distributions(data, tokenizer)
        if len(distributions) != 1:
            raise MoqaError(f"{len(distributions)} distributions to adjust to", "give one --data NAME=FILE")
        self._novel = distributions[0]
        self._windows = cut_windows(self._novel, tokenizer, CONTEXT, samples, seed)
        count = len(self._windows.inputs)
        if count < MIN_SAMPLES:
            raise MoqaError(
                f"{self._novel.name}={self._novel.origin} has only {count} samples of {CONTEXT} tokens",
                f"an adjustment needs at least {MIN_SAMPLES}: {MIN_SAMPLES * CONTEXT} tokens of text",
            )
        self._model = load_packed(self._packed, kernels="reference")

    def make(
        self,
        out: str | Path,
        budget: str | float = "1%",
        mode: str = "residual",
        rule: str = "gain",
        overwrite: bool = False,
    ) -> Adjusted:
        """Make an adjustment; see `adjust`."""
        how, ranks, share = MODES.find(mode), RULES.find(rule), parse_share(budget)
        if how.needs_whole and not self._cache.whole:
            raise MoqaError(f"--mode {mode} needs the whole original", "quantize with --cache full")
        evidence, measured_in = self._evidence
        started, packed, windows = time.perf_counter(), self._packed, self._windows
        situation = Situation(
            packed, self._model, self._open_layer, evidence, ranks, self._sizes, int(share * packed.bytes)
        )
        change = how.run(situation, self._report)
        record = AdjustmentRecord(
            moqa=__version__, checkpoint=packed.manifest.checksum, name=self._novel.name, mode=mode, rule=rule,
            budget=share, samples=len(windows.inputs), tokens=windows.inputs.numel(), seed=self._seed,
            expected=change.expected, fitted={self._novel.name: Fitted.of(self._novel.digest, windows.hashes)},
            sizes=self._sizes, channels=change.channels, units=change.units,
            extra_bytes=_extra_bytes(packed, self._sizes, change), weights=StoredFile(bytes=0, sha256=""),
        )  # fmt: skip
        written = write_adjustment(record, change.tensors, Path(out), overwrite)
        seconds = measured_in + time.perf_counter() - started
        return _summary(written, packed, evidence.measured.divergence, seconds)

    @cached_property
    def _evidence(self) -> tuple[Evidence, float]:
        """Measurements on the samples, and how many seconds they took."""
        started = time.perf_counter()
        cache, layers = self._cache, self._packed.manifest.layers
        measured = measure(self._model, self._open_layer, self._windows.inputs, cache.whole, self._seed, self._report)
        known = [cache.layer(layer).get("significance") for layer in range(layers)]
        return Evidence(measured, known, self._seed), time.perf_counter() - started

    def _open_layer(self, layer: int) -> LayerOriginals:
        return LayerOriginals(self._model, self._packed.manifest, self._cache, layer)


def _extra_bytes(packed: Checkpoint, sizes: ExpertSizes, change: Change) -> int:
    instead = sum(packed.manifest.units[name].scheme.stored_bytes(unit.shape) for name, unit in change.units.items())
    return layout(sizes, change.channels, change.units).bytes - instead


def _summary(written: Adjustment, packed: Checkpoint, divergence: float | None, seconds: float) -> Adjusted:
    record = written.record
    return Adjusted(
        adjustment=str(written.folder), checkpoint=str(packed.folder), name=record.name, mode=record.mode,
        rule=record.rule, samples=record.samples, tokens=record.tokens,
        channels=sum(sum(part.counts) for part in record.channels), units=len(record.units),
        bytes=record.weights.bytes, extra_bytes=record.extra_bytes,
        extra_bytes_percent=100 * record.extra_bytes / packed.bytes, divergence=divergence,
        expected=record.expected, search_seconds=seconds,
    )  # fmt: skip
