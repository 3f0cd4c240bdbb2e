"""`moqa.profile`: measure a model on distributions, reusing what the folder already holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from torch import Tensor

from moqa import __version__
from moqa.data import Data, prompt_start
from moqa.errors import MoqaError
from moqa.execution import Executor, LocalExecutor, Workspace
from moqa.forecast.disk import profile_disk_bytes
from moqa.forecast.working_set import WorkingSet
from moqa.format.manifest import Fitted
from moqa.format.tiles import check_group_size
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.methods.registry import METHODS
from moqa.models.load import read_config
from moqa.models.view import ModelView, open_model
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.originals.fingerprint import differing_part, fingerprint
from moqa.profiling.balanced import balanced_sample
from moqa.profiling.measure import Measurement
from moqa.profiling.record import SELF, DistributionRecord, OwnText, ProfileRecord, Settings, UnitRecord
from moqa.profiling.selfsample import self_sample
from moqa.profiling.sensitivity import PROBES, ErrorSettings
from moqa.profiling.store import RECORD, Profile, read_profile, stored_samples, write_profile
from moqa.progress import Report, quiet
from moqa.registry import check_known
from moqa.storage.folders import is_taken
from moqa.storage.paths import recorded, relative
from moqa.storage.resumable import ResumableRun, check_space, resumable, tidy
from moqa.tasks import task_of

DEFAULT_SAMPLES = 64
DEFAULT_CONTEXT = 256


def profile(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    samples: int = DEFAULT_SAMPLES,
    context: int = DEFAULT_CONTEXT,
    self_samples: int | None = None,
    own_text: str = "drawn",
    group_size: int = 64,
    symmetric: bool = False,
    method: str = "gptq",
    seed: int = 0,
    report: Report = quiet,
    view: ModelView | None = None,
    memory: MemoryLimit | None = None,
    restart: bool = False,
    sensitivity: bool = True,
    engine: Executor | None = None,
) -> Profile:
    """Measure what every expert and channel contributes, and what losing precision costs, on each distribution.

    >>> texts, few = {"wiki": "wiki.txt", "novels": "novels.txt"}, {"samples": 2, "context": 32, "self_samples": 1}
    >>> profile = moqa.profile("reference/model", texts, "runs/profile", method="rtn", **few)
    >>> profile.names
    ('novels', 'wiki')

    Args:
        model: folder or Hub id of the original model.
        data: texts to measure on, as distributions or name -> source; never the held-out text of an evaluation.
        out: profile folder. An existing one is reused: distributions that it holds for the same model, text and
            settings are not measured again, others are added.
        samples: windows per distribution.
        context: tokens in a window.
        self_samples: windows that the model writes itself, for a plan's hedge; None means as many as `samples`.
        own_text: how it writes them: `drawn` from its distribution, or `balanced` over its experts by a beam search
            (`moqa.profiling.balanced`).
        group_size: weights that share a scale in the rounding whose errors are measured.
        symmetric: whether that rounding has no zero-point.
        method: quantization method whose errors are measured: the one that will be used.
        seed: of the choice of windows, the labels and the model's own text.
        report: called with each step and its progress.
        view: the model, if it is already open.
        memory: limit for a process; None means all that is free.
        restart: start over, and discard what an earlier run has finished.
        sensitivity: whether to measure what losing precision costs, which takes most of the time; not all
            strategies need it (`needs_sensitivity` in `moqa.planning.STRATEGIES`).
        engine: where the work is done (`moqa.execution.find_executor`); None means in this process.

    Raises:
        MoqaError: if the model or a text cannot be used, or `out` holds a profile of another model or other settings.
    """
    out = Path(out)
    how = METHODS.find(method)
    check_group_size(group_size)
    check_known("--own-text", own_text, get_args(OwnText))
    folder = original.locate(model)
    task = task_of(read_config(folder))
    if not task.is_chain:
        raise MoqaError(f"{model} is a {task.kind}", "moqa vla profile measures it")
    reader = task.reader(folder)
    distributions = task.sources(data, reader)
    if not distributions:
        raise MoqaError("no distribution to profile on", "give at least one --data NAME=FILE")
    if any(d.name in (SELF, "weights") for d in distributions):
        raise MoqaError(f"--data {SELF}=... uses a name that moqa needs itself", "choose another name")
    if self_samples and not task.writes_samples:
        raise MoqaError(
            f"--self-samples {self_samples}: {model} is an {task.kind}", "it writes no samples: omit the option"
        )
    settings = Settings(
        context=task.context(context), samples=samples, seed=seed, group_size=group_size, symmetric=symmetric,
        method=method,
        sensitivity=sensitivity, own_text=own_text,
    )  # fmt: skip
    cut = {d.name: task.cut(d, reader, context, samples, seed) for d in distributions}
    records = {
        d.name: DistributionRecord(
            origin=recorded(d.origin, out), samples=len(cut[d.name].inputs), tokens=task.count(cut[d.name].inputs),
            fitted=Fitted.of(d.digest, cut[d.name].hashes),
        )
        for d in distributions
    }  # fmt: skip
    wanted = (samples if self_samples is None else self_samples) if task.writes_samples else 0
    if wanted:
        records[SELF] = DistributionRecord(
            origin=f"{wanted} windows drawn from the model, seed {seed}", samples=wanted, tokens=wanted * context,
            fitted=None,
        )  # fmt: skip
    tidy(out)
    old = _reusable(out, folder, settings)
    held = {} if old is None else old.record.distributions
    missing = [name for name, record in records.items() if not _same(held.get(name), record)]
    if old is not None:
        # an existing profile may hold more than was asked for, e.g. the sensitivity
        settings = old.record.settings
        if not missing:
            return old
    engine = engine or LocalExecutor()
    limits = engine.memory(memory)
    view = view or open_model(folder, keep=limits.holds(OriginalReader(folder).values))
    if own_text == "balanced" and not view.has_experts:
        raise MoqaError(f"--own-text balanced: {model} has no experts to balance", "leave the option out")
    identity = fingerprint(folder)
    job = {"moqa": __version__, "model": identity, **settings.model_dump(mode="json"),
           "texts": {name: records[name].model_dump(mode="json") for name in missing}}  # fmt: skip
    settle()
    room = WorkingSet.to_profile(limits, view, how, len(PROBES))
    check_space(out, profile_disk_bytes(view, sum(records[name].tokens for name in missing), len(missing)))
    engine.prepare(folder, out, report)
    with resumable(out, job, overwrite=True, restart=restart) as work:
        inputs = {name: cut[name].inputs for name in missing if name != SELF}
        if SELF in missing:
            inputs[SELF] = _own_text(view, wanted, settings, work, report, prompt_start(reader))
        errors = ErrorSettings.of(settings, how, room.experts)
        measurement = Measurement(Workspace(view, work), inputs, errors, seed, engine)
        measured, weights = measurement.run(report)
        statistics = {name: {**measured[name], "samples": stored_samples(inputs[name])} for name in missing}
        if old is not None:
            statistics = {**old.statistics, **statistics}
            records = {**old.record.distributions, **records}
        kept = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in view.kept_on_disk().items()}
        record = ProfileRecord(
            moqa=__version__, task=task.name, model=relative(model, out), model_type=view.model.config.model_type,
            # what an older moqa has measured is known to be of this model only as far as it recorded
            fingerprint=identity if old is None else old.record.fingerprint,
            kept=kept, left_out=view.left_out(),
            layers=len(view.blocks), top_k=view.top_k, settings=settings, widths=errors.widths,
            others=errors.others if "compared" in weights else (),
            units=tuple(UnitRecord.of(unit) for unit in view.units.values()),
            distributions={name: records[name] for name in statistics},
        )  # fmt: skip
        write_profile(Profile(record, work.result, statistics, weights))
    return Profile(record, out, statistics, weights)


def _own_text(
    view: ModelView, windows: int, settings: Settings, work: ResumableRun, report: Report, start: Sequence[int]
) -> Tensor:
    """[windows, context] text of the model itself, written now or before a kill."""
    if work.done("self") is None:
        report("self-sampling", 0, 1)
        sample = balanced_sample if settings.own_text == "balanced" else self_sample
        work.save("self", {"tokens": sample(view, windows, settings.context, settings.seed, start)})
        report("self-sampling", 1, 1)
        work.mark_done("self", {})
    return work.load("self")["tokens"]


def _reusable(out: Path, folder: Path, settings: Settings) -> Profile | None:
    if not is_taken(out):
        return None
    if not (out / RECORD).is_file():
        raise MoqaError(f"{out} exists and is not a profile", "choose another folder")
    old = read_profile(out)
    other = differing_part(folder, old.record.fingerprint)
    if other:
        what = f"{out} is the profile of {old.record.model}, another model"
        raise MoqaError(what, f"{folder} has other {other}: choose another folder")
    if settings not in (old.record.settings, old.record.settings.model_copy(update={"sensitivity": False})):
        was = ", ".join(f"{k} {v}" for k, v in old.record.settings.model_dump().items())
        raise MoqaError(f"{out} was made with {was}", "use the same settings or choose another folder")
    return old


def _same(old: DistributionRecord | None, new: DistributionRecord) -> bool:
    return old is not None and (old.fitted, old.samples) == (new.fitted, new.samples)
