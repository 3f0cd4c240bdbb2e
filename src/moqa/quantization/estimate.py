"""What a run of `moqa.quantize` will cost, before it reads a weight."""

import time
from pathlib import Path

from pydantic import BaseModel, Field

from moqa.errors import LittleMemoryError
from moqa.forecast.disk import largest_block_bytes, profile_disk_bytes
from moqa.forecast.working_set import ProfileWorkingSet, QuantizationWorkingSet, comparison_peak
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.methods import Method
from moqa.methods.registry import find_method
from moqa.models.view import ModelView, open_model
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.planning import Plan
from moqa.profiling import Profile
from moqa.profiling.sensitivity import PROBES
from moqa.quantization.clock import Clock, storage_rate
from moqa.quantization.run import disk_needed
from moqa.quantization.samples import tokens_of


class Estimate(BaseModel, frozen=True):
    """Cost of a run."""

    checkpoint_bytes: int = Field(description="of the weight files, exactly")
    peak_bytes: int = Field(description="largest resident memory of the process")
    disk_bytes: int = Field(description="checkpoint, cache and what is put aside, at the fullest moment")
    seconds: float = Field(
        description="on this machine, from the start of the command; by a calibration of a few seconds"
    )


def estimate(
    model: str | Path, plan: Plan, profile: Profile, *, method: str = "gptq", cache: str | None = None,
    memory: MemoryLimit | None = None, profiled: bool = True, view: ModelView | None = None, before: float = 0.0,
    held_out: int = 0,
) -> Estimate:  # fmt: skip
    """Cost of quantizing a model by a plan.

    >>> estimate("reference/model", plan, profile).checkpoint_bytes
    12922880

    Args:
        model: folder or Hub id of the original; its headers, routers and norms are read.
        plan: scheme of every unit.
        profile: the plan's, for the number of samples.
        method: as for `moqa.quantize`.
        cache: likewise.
        memory: likewise.
        profiled: whether the profile is there; else making it is part of the run.
        view: the model, if it is open already.
        before: seconds that are spent beside the work, such as the start of a command.
        held_out: tokens of text on which the checkpoint and others of its size will be compared with the original; 0:
            they will not be.

    Raises:
        MoqaError: if the model is unusable, the cache unknown or the memory too small.
    """
    how, folder, began = find_method(method), original.locate(model), time.perf_counter()
    view = view or open_model(folder, keep=False)
    before += time.perf_counter() - began
    limits = memory or MemoryLimit.free()
    peak = peak_bytes(view, plan, profile, how, limits, profiled, held_out)
    tokens = tokens_of(plan, profile) if how.needs_data else 0
    room = QuantizationWorkingSet.within(limits, view, how, tokens, largest_block_bytes(view, plan.units))
    clock = Clock(how, storage_rate(folder))
    quantizing = sum(clock.layer(view, layer, plan, tokens, room.ahead) for layer in range(len(view.blocks)))
    seconds, disk = before + quantizing, disk_needed(view, plan, profile, how, cache)
    if held_out:
        # uniform plans below and above, and the hand rule where there are experts
        others = 3 if view.has_experts else 2
        seconds += others * quantizing + clock.compared(view, plan, held_out, 1 + others)
        disk += disk_needed(view, plan, profile, how, None)
    if not profiled:
        first, holds = (
            ProfileWorkingSet.within(limits, view, how, len(PROBES)),
            limits.holds(OriginalReader(folder).values),
        )
        counts = {name: entry.tokens for name, entry in profile.record.distributions.items()}
        seconds += clock.profile(view, plan, counts, profile.record.settings, first.experts, holds)
        disk = max(disk, profile_disk_bytes(view, sum(counts.values()), len(counts)))
    return Estimate(
        checkpoint_bytes=plan.account.checkpoint, peak_bytes=peak, disk_bytes=disk, seconds=float(f"{seconds:.3g}")
    )


def peak_bytes(
    view: ModelView, plan: Plan, profile: Profile, method: Method, memory: MemoryLimit, profiled: bool, held_out: int
) -> int:
    """Bytes that will be resident at most in all steps of a run; arguments are those of `estimate`.

    >>> peak_bytes(view, plan, profile, METHODS["gptq"], MemoryLimit.parse("4GiB"), True, 0)
    996853440

    Raises:
        LittleMemoryError: of the step that needs most, if the memory does not hold one.
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
    found, lacking = [], []
    for step in steps:
        try:
            found.append(step())
        except LittleMemoryError as error:
            lacking.append(error)
    if lacking:
        raise max(lacking, key=lambda error: error.least)
    return max(found)
