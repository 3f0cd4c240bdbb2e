"""Forecast of the cost of quantizing: bytes are computed from shapes, seconds from a short trial."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from moqa.calibration.hidden import HiddenStates
from moqa.calibration.inputs import CalibrationBatch
from moqa.errors import LittleMemoryError
from moqa.evaluation.proof import baselines
from moqa.evaluation.trial import try_comparison, try_opening, try_scoring
from moqa.execution import Workspace
from moqa.forecast.disk import largest_block_bytes, profile_disk_bytes
from moqa.forecast.rates import Rates, TokenCost, block_kinds
from moqa.forecast.time import comparison_seconds, loading_seconds, profile_seconds, quantization_seconds
from moqa.forecast.trial import Stopwatch, states_in_front
from moqa.forecast.working_set import WorkingSet
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.methods import Method
from moqa.methods.registry import METHODS
from moqa.models.loader import ENDS
from moqa.models.view import ModelView, open_model
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.originals.rate import storage_rate
from moqa.planning import Plan, check_profile
from moqa.profiling import SELF, Profile
from moqa.profiling.passes import compared_every
from moqa.profiling.selfsample import OWN_BATCH
from moqa.profiling.sensitivity import PROBES, ErrorSettings
from moqa.profiling.trial import ProfileTrial, try_self_sampling
from moqa.quantization.run import disk_needed
from moqa.quantization.samples import tokens_of
from moqa.quantization.trial import TrialLayer, trial_batches, try_quantization
from moqa.storage.resumable import resumable
from moqa.storage.temporary import temporary_folder

# how much longer than on another text it takes to compare units on the model's own, of which twice as much is measured
_OWN_MORE = 1.5


class Estimate(BaseModel, frozen=True):
    """Estimated cost of a run."""

    checkpoint_bytes: int = Field(description="exact size of the weight files")
    peak_bytes: int = Field(description="largest resident memory of the process")
    disk_bytes: int = Field(description="most disk space at any time: checkpoint, cache and hidden states")
    seconds: float = Field(description="on this machine, from the start of the command, from a trial of a few seconds")


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
    check_profile(plan, profile)
    how, folder, began = METHODS.find(method), original.locate(model), time.perf_counter()
    view = view or open_model(folder, keep=False)
    before += time.perf_counter() - began
    limits = memory or MemoryLimit.free()
    rooms = working_sets(view, plan, profile, how, limits, profiled=profiled, held_out=held_out)
    room, first = rooms[0], None if profiled else rooms[1]
    tokens = tokens_of(plan, profile) if how.needs_data else 0
    # a command that runs all steps keeps the original in memory if it fits
    whole = bool(held_out or first) and limits.holds(OriginalReader(folder).values)
    trial = Trial(
        view, plan, profile, how, room.experts, None if first is None else first.experts, bool(held_out), whole
    )
    rates = trial.run()
    seconds = before + rates.once
    if whole:
        seconds += loading_seconds(rates)
        rates = rates.loaded()
    quantizing = quantization_seconds(rates, tokens, plan.account.kept, room.experts, ahead=room.ahead and not whole)
    seconds += quantizing
    disk = disk_needed(view, plan, profile, how, cache)
    if held_out:
        others = len(baselines(profile, plan))
        seconds += others * quantizing + comparison_seconds(rates, held_out, 1 + others)
        disk += disk_needed(view, plan, profile, how, None)
    if first is not None:
        settings, counts = profile.record.settings, trial.counts()
        seconds += profile_seconds(
            rates, counts, trial.compared_counts(), trial.steps(), first.experts, sensitivity=settings.sensitivity
        )
        disk = max(disk, profile_disk_bytes(view, sum(counts), len(counts)))
    return Estimate(
        checkpoint_bytes=plan.account.checkpoint, peak_bytes=max(step.peak for step in rooms), disk_bytes=disk,
        seconds=float(f"{seconds:.3g}"),
    )  # fmt: skip


def working_sets(
    view: ModelView,
    plan: Plan,
    profile: Profile,
    method: Method,
    memory: MemoryLimit,
    *,
    profiled: bool,
    held_out: int,
) -> list[WorkingSet]:
    """Working sets of all steps of a run: quantizing, profiling, comparing; for the arguments see `estimate`.

    >>> limit = MemoryLimit.parse("4GiB")
    >>> steps = working_sets(view, plan, profile, METHODS["gptq"], limit, profiled=True, held_out=0)
    >>> max(step.peak for step in steps) < 4 * 2**30
    True

    Raises:
        LittleMemoryError: if a step does not fit the memory limit; it names the step that needs most.
    """

    def quantizing() -> WorkingSet:
        packed = largest_block_bytes(view, plan.units)
        return WorkingSet.to_quantize(memory, view, method, tokens_of(plan, profile), packed)

    def profiling() -> WorkingSet:
        room = WorkingSet.to_profile(memory, view, method, len(PROBES))
        return replace(room, peak=room.peak + view.missing(memory))

    settle()
    steps = [quantizing] if profiled else [quantizing, profiling]
    if held_out:
        steps.append(lambda: WorkingSet.to_compare(memory, view, plan.account.checkpoint, held_out))
    found, errors = [], []
    for step in steps:
        try:
            found.append(step())
        except LittleMemoryError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.least)
    return found


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

    def compared_counts(self) -> list[int]:
        """Tokens of each distribution by which units are compared, weighed by the time that they take."""
        return [
            round(entry.tokens / compared_every(entry.samples) * (_OWN_MORE if name == SELF else 1))
            for name, entry in self.profile.record.distributions.items()
        ]

    def steps(self) -> int:
        """Steps in which the model writes its own text, each one token of every window of a batch."""
        own = self.profile.record.distributions.get(SELF)
        return 0 if own is None else -(-own.samples // OWN_BATCH) * (self.profile.record.settings.context - 1)

    def run(self, watch: Stopwatch | None = None) -> Rates:
        """Run a small part of every step and time it."""
        watch = watch or Stopwatch()
        with temporary_folder() as folder, resumable(folder / "trial", {}) as work:
            return self._tried(Workspace(self.view, work), watch)

    def _tried(self, workspace: Workspace, watch: Stopwatch) -> Rates:
        view, task, settings = self.view, self.view.task, self.profile.record.settings
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
        profiling, outside, steps, labels = None, 0.0, dict[int, float](), TokenCost()
        if self.errors is not None and self.steps():
            own = self.profile.record.distributions[SELF].samples
            outside, steps = try_self_sampling(view, sorted(set(kinds)), own, settings.context, watch)
        scoring = try_scoring(stages, batch, watch) if self.compared else TokenCost()
        if self.errors is not None:
            few = {"few": self._samples(4), "more": self._samples(4 * len(batch))}
            profiling = ProfileTrial(workspace, ErrorSettings.of(settings, self.method, self.errors), few, watch)
            labels = profiling.labels() if profiling.how.probes else TokenCost()
        blocks = {}
        for layer in dict.fromkeys(kinds):
            gradients = self.profile.gradients(layer, self.plan.mixture)
            tried = TrialLayer(workspace, layer, self.plan.units, self.method, self.experts, each, watch, gradients)
            batches = list[CalibrationBatch]()
            if moving is not None:
                moving.put(layer, 0, hidden[layer])
                batches += [CalibrationBatch(hidden[layer])] * fit
                batches += [CalibrationBatch(held_out[layer], check=True)] * checked
            try_quantization(tried, batches, moving)
            if profiling is not None:
                view.need(layer)
                profiling.layer(layer, tried.few_experts()[: profiling.how.experts], tried.rates)
                tried.rates.step = steps.get(layer, 0.0)
            if self.compared:
                try_comparison(tried, hidden[layer], self.whole)
            blocks[layer] = tried.rates
        return Rates(
            kinds, blocks, storage_rate(view.folder), torch.get_num_threads(), watch.once, ends,
            TokenCost(0.0, embedding), labels, outside, scoring,
            try_opening(view, watch) if self.compared else 0.0,
        )  # fmt: skip

    def _samples(self, count: int) -> torch.Tensor:
        """Random inputs for the model."""
        generator = torch.Generator().manual_seed(0)
        if self.view.task.predicts_each:
            shape = (count, self.profile.record.settings.context)
            return torch.randint(self.view.classes, shape, generator=generator)
        return torch.randn(count, *self.view.task.probe(self.view.model).shape[1:], generator=generator)
