"""A trial of quantizing one layer: each part of the driver's work is done on a few samples, and timed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

import torch

from moqa.calibration.hidden import HiddenStates
from moqa.calibration.inputs import HELD_OUT_EVERY, BlockInputs, CalibrationBatch, InputStatistics, by_input
from moqa.calibration.outputs import Gradients
from moqa.calibration.stacks import STACK_WEIGHTS
from moqa.execution import Workspace
from moqa.forecast.rates import BlockRates, TokenCost
from moqa.forecast.trial import Stopwatch
from moqa.format.layout import shards
from moqa.format.scheme import Scheme
from moqa.format.writer import write_shard
from moqa.methods import Method
from moqa.models.units import Unit
from moqa.quantization.checkpoint import stored_tensors
from moqa.quantization.layer import QuantizedUnit, quantized
from moqa.quantization.pieces import BlockPiece, quantize_piece

# largest numbers of batches in a trial; a run may have more, of the same cost each
_MAX_FIT, _MAX_CHECKED = 3, 4


@dataclass(frozen=True)
class TrialLayer:
    """The layer of a trial.

    Attributes:
        workspace: the model, and a temporary work folder.
        layer: index of the layer.
        schemes: unit name -> scheme.
        method: how it is quantized.
        experts: largest number of experts whose statistics are held at a time.
        predictions: of one sample, see `Task.count`.
        watch: times the work.
        gradients: at the layer's output, with which it is solved; None if they were not measured.
        rates: of the layer, filled in by each trial.
        done: unit name -> result; those of a few experts are used for the others, too.
        stored: unit name -> scheme of that result.
    """

    workspace: Workspace
    layer: int
    schemes: Mapping[str, Scheme]
    method: Method
    experts: int
    predictions: int
    watch: Stopwatch
    gradients: Gradients | None = None
    rates: BlockRates = field(default_factory=BlockRates)
    done: dict[str, QuantizedUnit] = field(default_factory=dict)
    stored: dict[str, Scheme] = field(default_factory=dict)

    def units(self) -> list[Unit]:
        """All units of the layer."""
        return self.workspace.view.block_units(self.layer)

    def few_experts(self) -> list[int]:
        """As many experts as fill a stack, evenly spread over the layer."""
        units = self.units()
        every = sorted({unit.expert for unit in units if unit.expert is not None})
        spaces = by_input(unit for unit in units if unit.expert is not None).values()
        largest = max((sum(unit.weights for unit in sharing) for sharing in spaces), default=1)
        count = max(1, min(max(2, STACK_WEIGHTS // largest), self.experts, len(every)))
        return [every[len(every) * number // count] for number in range(count)] if every else []


@torch.no_grad()
def try_quantization(tried: TrialLayer, batches: Sequence[CalibrationBatch], moving: HiddenStates | None) -> None:
    """Quantize a layer as `moqa.quantize` does, with a few samples and a few of its experts.

    Args:
        tried: the layer; gets its rates and results.
        batches: samples to fit on, then those on which results are compared; none for a method that needs no data.
        moving: one batch of samples, as inputs of the layer; None for a method that needs no data.
    """
    view, layer, rates, watch = tried.workspace.view, tried.layer, tried.rates, tried.watch
    rates.read, rates.read_work = watch.single(lambda: view.need(layer))
    units, few = tried.units(), tried.few_experts()
    inputs = None
    seen: dict[str, InputStatistics] = {}
    if batches:
        inputs = _inputs(tried, batches)
        seen |= inputs.linear
        if few:
            _time_experts(tried, inputs, few)
            seen |= inputs.experts(few)

    def solve(some: Sequence[Unit]) -> None:
        schemes = {unit.name: tried.schemes[unit.name] for unit in some}
        piece = BlockPiece(layer, tried.method, schemes, linear=seen, gradients=tried.gradients)
        tried.done.update(quantize_piece(tried.workspace, piece))

    linear = [unit for unit in units if unit.expert is None]
    routed = [unit for unit in units if unit.expert in few]
    rates.linear = watch.seconds(lambda: solve(linear)) if linear else 0.0
    rates.solve = watch.seconds(lambda: solve(routed)) / len(few) if few else 0.0
    tried.stored.update({name: tried.schemes[name] for name in tried.done})
    alike = {(unit.expert, unit.projection): unit.name for unit in routed}
    for unit in units:
        if unit.name not in tried.done and unit.expert is not None:
            other = alike[few[unit.expert % len(few)], unit.projection]
            tried.done[unit.name], tried.stored[unit.name] = tried.done[other], tried.schemes[other]
    if moving is not None:
        rates.advance = _advance(tried, moving)
    if inputs is not None:
        inputs.drop()
    rates.experts = len({unit.expert for unit in units if unit.expert is not None})
    rates.bytes = sum(unit.weights * view.stored_dtype(unit).itemsize for unit in units)
    _write(tried)


def _inputs(tried: TrialLayer, batches: Sequence[CalibrationBatch]) -> BlockInputs:
    """Inputs of the layer; times collecting them, per token of the samples."""
    watch, marks = tried.watch, list[float]()

    def timed() -> Iterator[CalibrationBatch]:
        for batch in batches:
            marks.append(watch.clock())
            yield batch

    inputs = BlockInputs(
        tried.workspace.view, tried.workspace.stages, tried.layer, timed(), tried.workspace.work,
        with_slopes=tried.gradients is not None,
    )  # fmt: skip
    marks.append(watch.clock())
    took = [end - begin for begin, end in pairwise(marks)]
    fit = [seconds for seconds, batch in zip(took, batches, strict=True) if not batch.check]
    checked = [seconds for seconds, batch in zip(took, batches, strict=True) if batch.check]
    again = fmean(fit[1:] or fit)
    watch.once += max(fit[0] - again, 0.0)
    each = again / (len(batches[0].hidden) * tried.predictions)
    check = fmean(checked) / (len(batches[-1].hidden) * tried.predictions) if checked else each
    tried.rates.inputs = TokenCost(0.0, _mixed(each, check))
    return inputs


def _time_experts(tried: TrialLayer, inputs: BlockInputs, few: Sequence[int]) -> None:
    """Time reading all calls of the experts, and gathering one expert's inputs."""
    view, parts = tried.workspace.view, inputs.parts
    fit = [part for part in parts if not part.check]
    # parts only know their share: tokens are counted in the recorded calls
    counts = [len(tried.workspace.work.load(f".experts-{number}")["index"]) for number in range(len(parts))]

    def seconds(which: Sequence[int], some: Sequence[CalibrationBatch]) -> float:
        recorded = BlockInputs.recorded(
            view, tried.layer, some, tried.workspace.work, with_slopes=tried.gradients is not None
        )
        return tried.watch.seconds(lambda: recorded.experts(which))

    every, fitted, first = sum(counts), sum(counts[: len(fit)]), counts[0]
    call = seconds((), parts) / every
    one, some, all_ = (seconds(few, parts[:count]) for count in (1, len(fit), len(parts)))
    gathered = inputs.experts(few)
    rows = sum(statistics.tokens for name, statistics in gathered.items() if name.endswith(".in"))
    # a router may send more tokens to these experts than to others: scale to an average expert
    share = fitted * view.top_k / view.experts(tried.layer).num_experts * len(few) / max(rows, 1)
    line = TokenCost.through((first, one - call * first), (fitted, some - call * fitted))
    check = (all_ - some - call * (every - fitted)) / (every - fitted) if every > fitted else line.token
    token = _mixed(line.token, max(check, 0.0)) * share / len(few)
    tried.rates.calls, tried.rates.expert = TokenCost(0.0, call), TokenCost(line.fixed / len(few), token)


def _advance(tried: TrialLayer, moving: HiddenStates) -> TokenCost:
    view, layer = tried.workspace.view, tried.layer
    hidden = moving.at(layer, 0)

    def move() -> None:
        moving.advance(layer)
        tried.workspace.work.flush()

    def whole() -> None:
        with quantized(view, layer, tried.done, tried.stored):
            move()

    first = tried.watch.seconds(whole)
    with quantized(view, layer, tried.done, tried.stored):
        each = tried.watch.seconds(move)
    return TokenCost(max(first - each, 0.0), each / (len(hidden) * tried.predictions))


def _write(tried: TrialLayer) -> None:
    """Write the result, and time it."""
    entries = {unit.name: (tried.layer, unit.shape, tried.stored[unit.name]) for unit in tried.units()}
    shard = shards({}, len(tried.workspace.view.blocks), entries)[tried.layer + 1]
    work, tensors = tried.workspace.work, stored_tensors(tried.done)

    def write() -> None:
        file = write_shard(work.result, shard, tensors)
        work.mark_done(f"layer-{tried.layer}", file.model_dump(mode="json"), {shard.file: file.sha256})

    tried.rates.written = shard.bytes
    tried.rates.write, tried.rates.write_work = tried.watch.single(write)


def _mixed(fit: float, check: float) -> float:
    """Average seconds per token, of which one in `HELD_OUT_EVERY` is held out from fitting."""
    return fit + (check - fit) / HELD_OUT_EVERY


def trial_batches(windows: int, together: int) -> tuple[int, int, int]:
    """Size of a trial for a number of windows: batches to fit on, batches to compare on, windows per batch of these.

    >>> trial_batches(windows=64, together=4)
    (3, 2, 4)
    >>> trial_batches(windows=16, together=4)
    (3, 1, 2)

    Args:
        windows: number of windows of all samples.
        together: windows per batch.
    """
    checked = max(1, windows // HELD_OUT_EVERY)
    size = min(checked, together)
    fit = max(1, min(_MAX_FIT, (windows - checked) // together))
    return fit, max(1, min(_MAX_CHECKED, checked // size)), size
