"""Forecast of the cost of quantizing: bytes are computed from shapes, seconds from a short trial."""

import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moqa.calibration.hidden import HiddenStates
from moqa.calibration.inputs import CalibrationBatch
from moqa.errors import LittleMemoryError
from moqa.evaluation.proof import baselines
from moqa.evaluation.trial import try_comparison, try_opening, try_scoring
from moqa.execution import Workspace
from moqa.forecast.disk import largest_block_bytes, profile_disk_bytes
from moqa.forecast.estimate import Estimate
from moqa.forecast.rates import BlockRates, ComparisonRates, ProfileRates, Rates, TokenCost, block_kinds
from moqa.forecast.samples import states_in_front
from moqa.forecast.stopwatch import Stopwatch
from moqa.forecast.time import comparison_seconds, loading_seconds, profile_seconds, quantization_seconds
from moqa.forecast.working_set import ProfileWorkingSet, QuantizationWorkingSet, comparison_peak
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.methods import Method
from moqa.methods.registry import find_method
from moqa.models.loader import ENDS
from moqa.models.view import ModelView, open_model
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.originals.rate import storage_rate
from moqa.planning import Plan
from moqa.profiling import SELF, Profile
from moqa.profiling.passes import ErrorSettings
from moqa.profiling.selfsample import OWN_BATCH
from moqa.profiling.sensitivity import PROBES
from moqa.profiling.trial import ProfileTrial, try_self_sampling
from moqa.quantization.run import disk_needed
from moqa.quantization.samples import tokens_of
from moqa.quantization.trial import TrialLayer, trial_batches, try_quantization
from moqa.storage.resumable import resumable


def estimate(
    model: str | Path, plan: Plan, profile: Profile, *, method: str = "gptq", cache: str | None = None,
    memory: MemoryLimit | None = None, profiled: bool = True, view: ModelView | None = None, before: float = 0.0,
    held_out: int = 0,
) -> Estimate:  # fmt: skip
    """Cost of quantizing a model by a plan.

    >>> estimate("reference/model", plan, profile, method="rtn").checkpoint_bytes == plan.account.checkpoint
    True

    Args:
        model: folder or Hub id of the original; one decoder layer of each kind is read and tried for a few seconds.
        plan: scheme of every unit.
        profile: the plan's profile; its number of samples is used.
        method: as for `moqa.quantize`.
        cache: as for `moqa.quantize`.
        memory: as for `moqa.quantize`.
        profiled: whether the profile exists already; if not, its cost is included.
        view: the model, if it is already open.
        before: further seconds to include, such as the start of a command.
        held_out: tokens of text on which the checkpoint and baselines of its size will be compared with the original;
            0 if there will be no comparison.

    Raises:
        MoqaError: if the model cannot be used, the cache option is unknown or the memory limit is too small.
    """
    how, folder, began = find_method(method), original.locate(model), time.perf_counter()
    view = view or open_model(folder, keep=False)
    before += time.perf_counter() - began
    limits = memory or MemoryLimit.free()
    peak = peak_bytes(view, plan, profile, how, limits, profiled=profiled, held_out=held_out)
    tokens = tokens_of(plan, profile) if how.needs_data else 0
    room = QuantizationWorkingSet.within(limits, view, how, tokens, largest_block_bytes(view, plan.units))
    first = None if profiled else ProfileWorkingSet.within(limits, view, how, len(PROBES))
    # a command that runs all steps keeps the original in memory if it fits
    whole = bool(held_out or not profiled) and limits.holds(OriginalReader(folder).values)
    trial = Trial(
        view, plan, profile, how, room.experts, None if first is None else first.experts, bool(held_out), whole
    )
    rates = trial.run()
    quantizing = quantization_seconds(
        rates, tokens, plan.account.kept, room.experts, ahead=room.ahead and not whole, whole=whole
    )
    seconds = before + rates.once + quantizing + (loading_seconds(rates) if whole else 0.0)
    disk = disk_needed(view, plan, profile, how, cache)
    if held_out:
        others = len(baselines(profile, plan))
        seconds += others * quantizing + comparison_seconds(rates, held_out, 1 + others, whole=whole)
        disk += disk_needed(view, plan, profile, how, None)
    if first is not None:
        settings, counts = profile.record.settings, trial.counts()
        seconds += profile_seconds(
            rates, counts, trial.steps(), first.experts, sensitivity=settings.sensitivity, whole=whole
        )
        disk = max(disk, profile_disk_bytes(view, sum(counts), len(counts)))
    return Estimate(
        checkpoint_bytes=plan.account.checkpoint, peak_bytes=peak, disk_bytes=disk, seconds=float(f"{seconds:.3g}")
    )


def peak_bytes(
    view: ModelView,
    plan: Plan,
    profile: Profile,
    method: Method,
    memory: MemoryLimit,
    *,
    profiled: bool,
    held_out: int,
) -> int:
    """Peak resident memory over all steps of a run, in bytes; for the arguments see `estimate`.

    >>> limit = MemoryLimit.parse("4GiB")
    >>> peak_bytes(view, plan, profile, find_method("gptq"), limit, profiled=True, held_out=0) < 4 * 2**30
    True

    Raises:
        LittleMemoryError: if a step does not fit the memory limit; it names the step that needs most.
    """

    def quantizing() -> int:
        tokens = tokens_of(plan, profile) if method.needs_data else 0
        return QuantizationWorkingSet.within(memory, view, method, tokens, largest_block_bytes(view, plan.units)).peak

    def profiling() -> int:
        return ProfileWorkingSet.within(memory, view, method, len(PROBES)).peak + view.missing(memory)

    settle()
    steps = [quantizing] if profiled else [quantizing, profiling]
    if held_out:
        steps.append(lambda: comparison_peak(memory, view, plan.account.checkpoint, held_out))
    peaks, errors = [], []
    for step in steps:
        try:
            peaks.append(step())
        except LittleMemoryError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.least)
    return max(peaks)


@dataclass(frozen=True)
class Trial:
    """Times the steps of a run, each on one decoder layer of every kind with some random tokens.

    Args:
        view: the model.
        plan: schemes of its units.
        profile: the plan's profile; its sample sizes are used.
        method: the quantization method.
        experts: number of experts whose statistics are in memory at a time.
        errors: number of experts whose errors are in memory at a time during profiling; None without profiling.
        compared: whether checkpoints will be compared with the original.
        whole: whether the whole original is in memory.
    """

    view: ModelView
    plan: Plan
    profile: Profile
    method: Method
    experts: int
    errors: int | None
    compared: bool
    whole: bool

    def counts(self) -> list[int]:
        """Tokens of each distribution."""
        return [entry.tokens for entry in self.profile.record.distributions.values()]

    def steps(self) -> int:
        """Steps in which the model writes its own text, each one token of every window of a batch."""
        own = self.profile.record.distributions.get(SELF)
        return 0 if own is None else -(-own.samples // OWN_BATCH) * (self.profile.record.settings.context - 1)

    def run(self, watch: Stopwatch | None = None) -> Rates:
        """Run a small part of every step and time it."""
        watch = watch or Stopwatch()
        with tempfile.TemporaryDirectory(prefix="moqa-") as folder, resumable(Path(folder) / "trial", {}) as work:
            return self._tried(Workspace(self.view, work), watch)

    def _tried(self, workspace: Workspace, watch: Stopwatch) -> Rates:
        view, task = self.view, self.view.task
        assert view.folder is not None
        ends, kinds = watch.single(lambda: view.need(ENDS))[0], block_kinds(view)
        stages, each = workspace.stages, task.count(self._samples(1))
        together = max(1, task.batch_size // each)
        samples = tokens_of(self.plan, self.profile) // each
        batch = self._samples(min(together, max(samples, 1)))
        embedding = watch.seconds(lambda: stages.embed(batch)) / task.count(batch)
        fit, checked, size = trial_batches(samples, len(batch))
        hidden = states_in_front(stages, batch, set(kinds))
        held_out, moving = states_in_front(stages, self._samples(size), set(kinds)), None
        if self.method.needs_data:
            moving = HiddenStates(stages, workspace.work, "moving", [batch])
        profiling = self._profiling(workspace, self._samples(2), self._samples(2 * len(batch)))
        steps = self._steps(set(kinds), watch)
        scoring = try_scoring(stages, batch, watch) if self.compared else TokenCost()
        labels = profiling.labels(watch) if profiling and profiling.how.probes else TokenCost()
        blocks = {}
        for layer in dict.fromkeys(kinds):
            tried = TrialLayer(workspace, layer, self.plan.units, self.method, self.experts, each)
            batches = list[CalibrationBatch]()
            if moving is not None:
                moving.put(layer, 0, hidden[layer])
                batches += [CalibrationBatch(hidden[layer])] * fit
                batches += [CalibrationBatch(held_out[layer], check=True)] * checked
            found = try_quantization(tried, batches, moving, watch)
            blocks[layer] = BlockRates(
                len({unit.expert for unit in tried.units() if unit.expert is not None}),
                found.file,
                found.rates,
                self._profiled(profiling, tried, steps[1], watch),
                try_comparison(tried, found, hidden[layer], self.whole, watch) if self.compared else ComparisonRates(),
            )
        return Rates(
            kinds, blocks, storage_rate(view.folder), torch.get_num_threads(), watch.once, ends,
            TokenCost(0.0, embedding), labels, steps[0], scoring,
            try_opening(view, watch) if self.compared else 0.0,
        )  # fmt: skip

    def _samples(self, count: int) -> torch.Tensor:
        """Random inputs for the model."""
        generator = torch.Generator().manual_seed(0)
        if self.view.task.predicts_each:
            shape = (count, self.profile.record.settings.context)
            return torch.randint(self.view.classes, shape, generator=generator)
        return torch.randn(count, *self.view.task.probe(self.view.model).shape[1:], generator=generator)

    def _profiling(self, workspace: Workspace, few: torch.Tensor, more: torch.Tensor) -> ProfileTrial | None:
        if self.errors is None:
            return None
        how = ErrorSettings.of(self.profile.record.settings, self.method, self.errors)
        return ProfileTrial(workspace, how, few, more)

    def _steps(self, firsts: Collection[int], watch: Stopwatch) -> tuple[float, dict[int, float]]:
        if self.errors is None or not self.steps():
            return 0.0, {}
        own = self.profile.record.distributions[SELF].samples
        return try_self_sampling(self.view, sorted(firsts), own, self.profile.record.settings.context, watch)

    def _profiled(
        self, profiling: ProfileTrial | None, tried: TrialLayer, steps: dict[int, float], watch: Stopwatch
    ) -> ProfileRates:
        if profiling is None:
            return ProfileRates()
        self.view.need(tried.layer)
        few = tried.few_experts()[: profiling.how.experts]
        return replace(profiling.layer(tried.layer, few, watch), step=steps.get(tried.layer, 0.0))
