"""`moqa.compress`: make a checkpoint with its proof from a model, texts and a budget."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moqa.compression.job import CompressJob
from moqa.compression.options import DEFAULTS, CompressOptions
from moqa.compression.result import CompressResult
from moqa.data import Data
from moqa.estimate import Estimate, estimate, working_sets
from moqa.evaluation.proof import ProofSetup, prove
from moqa.execution import Executor
from moqa.format.reader import read_checkpoint
from moqa.memory.limit import MemoryLimit
from moqa.models.view import ModelView, open_model
from moqa.originals import OriginalReader
from moqa.planning import Budget, Plan
from moqa.profiling import Profile, profile
from moqa.progress import Report, quiet
from moqa.quantization import quantize
from moqa.quantization.run import disk_needed
from moqa.storage.folders import PLACED, beside
from moqa.storage.resumable import check_space
from moqa.training import recover, trains_whole


def compress(
    model: str | Path,
    data: Data,
    budget: Budget | str | None,
    out: str | Path,
    *,
    held_out: Data | None = None,
    options: CompressOptions = DEFAULTS,
    report: Report = quiet,
    memory: MemoryLimit | None = None,
    executor: Executor | None = None,
    when_quantized: Callable[[CompressResult], None] | None = None,
) -> CompressResult:
    """Profile, plan, quantize, compare with baselines on held-out text, and make a report.

    >>> texts = {"wiki": "wiki.txt", "novels": "novels.txt"}  # doctest: +SKIP
    >>> result = moqa.compress("reference/model", texts, "3bpw", "runs/out")
    >>> result.proof.gain("wiki")
    0.52

    After a kill, the same call continues the run; the resulting bytes are the same.

    Args:
        model: folder or Hub id of the original model.
        data: texts that the model will see: distributions, "NAME=SOURCE" strings, or name -> source or texts.
        budget: limit in bytes, e.g. "2.5bpw" (of the units), "12MiB" (all weight files) or a `moqa.memory_budget`; None
            if the strategy needs no budget.
        out: checkpoint folder to make; it also gets `plan.json`, `proof.json` and `report.html`.
        held_out: texts for the proof, in the same form; None holds out the last fifth of each text of `data`.
        options: all other options, see `CompressOptions`.
        report: called with the progress, see `moqa.progress.Report`.
        memory: memory that a process may take; None means all free memory.
        executor: where the work is done (`moqa.find_executor`); None means in this process.
        when_quantized: called after the checkpoint is written, before its proof.

    Raises:
        MoqaError: if the model or a text cannot be used, an option is unknown, the budget is out of reach, memory or
            disk space is too small, or `out` exists.
    """
    job = CompressJob(
        model, data, budget, out, held_out=held_out, options=options, memory=memory, executor=executor
    )  # fmt: skip
    view = open_model(job.folder, keep=job.memory.holds(OriginalReader(job.folder).values))
    _check_resources(job, view)
    if options.recover is not None:
        trains_whole(view, job.memory)  # refuses if it cannot train even one block
    result = _quantized(job, view, report).store()
    if when_quantized is not None:
        when_quantized(result)
    if not job.options.proof:
        return result
    setup = ProofSetup(
        job.model, view, result.profile, held_out=job.held_out, windows=job.windows, report=report, memory=job.memory
    )
    return replace(result, proof=prove(setup, result.plan, job.out, options.method, report)).store()


def forecast(
    model: str | Path, data: Data, budget: Budget | str | None, out: str | Path, *, held_out: Data | None = None,
    options: CompressOptions = DEFAULTS, memory: MemoryLimit | None = None, executor: Executor | None = None,
    before: float = 0.0,
) -> tuple[Estimate, Plan, Profile]:  # fmt: skip
    """Estimate the cost of `compress` with the same arguments; works with or without an existing profile.

    >>> cost, plan, profile = forecast("reference/model", {"wiki": "wiki.txt"}, "3bpw", "runs/new")
    >>> cost.checkpoint_bytes == plan.account.checkpoint
    True

    Args:
        model: as for `compress`, like all arguments that are not described here.
        before: further seconds to include, such as the start of a command.

    Returns:
        The cost, and the plan and the profile that it was computed from; without an existing profile, a blank one.

    Raises:
        MoqaError: as for `compress`.
    """
    began = time.perf_counter()
    job = CompressJob(
        model, data, budget, out, held_out=held_out, options=options, memory=memory, executor=executor
    )  # fmt: skip
    view = open_model(job.folder, keep=False)
    measured, chosen = job.expected(view)
    cost = estimate(
        job.folder, chosen, measured, method=options.method, cache=options.cache, memory=job.memory,
        profiled=job.is_profiled, view=view, held_out=job.tokens,
        before=before + time.perf_counter() - began,
    )  # fmt: skip
    return cost, chosen, measured


def _check_resources(job: CompressJob, view: ModelView) -> None:
    """Refuse too little disk space or memory now, not after hours of measuring."""
    if job.is_profiled or (job.budget is None and job.strategy.needs_profile):
        return
    blank, likely = job.expected(view)
    check_space(job.out, disk_needed(view, likely, blank, job.method, job.options.cache))
    working_sets(view, likely, blank, job.method, job.memory, profiled=False, held_out=job.tokens)


def _quantized(job: CompressJob, view: ModelView, report: Report) -> CompressResult:
    """Make the checkpoint, continuing from what an earlier run has finished."""
    options = job.options
    measured = profile(
        job.model, job.fitted, job.profile_folder, samples=options.samples, context=options.context,
        self_samples=options.self_samples, group_size=options.group_size, symmetric=options.symmetric,
        method=options.method, seed=options.seed, report=report, view=view, memory=job.memory,
        restart=options.restart, sensitivity=job.strategy.needs_sensitivity, engine=job.executor,
    )  # fmt: skip
    chosen = job.plan(measured)
    if options.overwrite or beside(job.out, PLACED).exists() or not job.is_quantized(chosen, measured):
        # for an existing profile, nothing has checked yet whether the proof fits the memory limit
        working_sets(view, chosen, measured, job.method, job.memory, profiled=True, held_out=job.tokens)
        quantize(
            job.model, chosen, job.out, method=options.method, overwrite=options.overwrite, report=report,
            profile=measured, view=view, cache=options.cache, memory=job.memory, restart=options.restart,
            engine=job.executor, widths_nested=options.widths_nested,
        )  # fmt: skip
    if options.recover is not None and read_checkpoint(job.out).manifest.recovery is None:
        recover(
            job.out, job.out, length=options.recover, profile=measured, model=job.folder, overwrite=True,
            restart=options.restart, seed=options.seed, optimizer=options.optimizer, report=report, memory=job.memory,
        )  # fmt: skip
    return CompressResult(job.out, chosen, measured, job.budget)
