"""`moqa vla profile`: measure how far each unit of a policy moves vision from language, and the actions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moqa import __version__
from moqa.data import Data, ObservationSamples
from moqa.errors import MoqaError
from moqa.format.manifest import Fitted
from moqa.format.scheme import Scheme
from moqa.format.tiles import check_group_size
from moqa.methods import METHODS
from moqa.models.load import read_config
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.fingerprint import fingerprint
from moqa.profiling.record import DistributionRecord, ProfileRecord, Settings, UnitRecord
from moqa.profiling.sensitivity import ErrorSettings, all_widths, compared_errors, relative_errors
from moqa.profiling.store import Profile, read_profile, write_profile
from moqa.progress import Report, quiet
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded, relative
from moqa.storage.resumable import ResumableRun, as_json, resumable, tidy
from moqa.tasks import Samples, task_of
from moqa.vla.page import render
from moqa.vla.shifts import PART_WIDTHS, SHIFTS, ShiftComparison, gradients, parts_in

DEFAULT_SAMPLES = 64
PAGE = "report.html"
# share of alignment in the cost of a plan, the rest is the shift of the actions
DEFAULT_ALIGNMENT = 0.5


def profile_policy(
    policy: str | Path,
    data: Data,
    out: str | Path,
    *,
    samples: int = DEFAULT_SAMPLES,
    group_size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
) -> Profile:
    """Measure what losing precision in each unit does to alignment and actions.

    >>> profile = profile_policy("reference/policy", "demos=DEMONSTRATIONS", "runs/profile")  # doctest: +SKIP
    >>> profile.statistics["demos"]["shift.token"].shape  # doctest: +SKIP
    torch.Size([49, 8])

    When a run that was killed is started again, it goes on after the last measured unit.

    Args:
        policy: folder of the original.
        data: demonstrations, NAME=FOLDER; episodes that are held out are not read.
        out: profile folder.
        samples: observations of each source.
        group_size: weights that share a scale in the rounding whose effect is measured.
        seed: of the choice of observations.
        overwrite: replace what exists at `out`.
        restart: start over, and discard what an earlier run has finished.
        report: called with each step and its progress.

    Raises:
        MoqaError: if the policy's parts cannot be found, or the demonstrations are not for it.
    """
    out, folder = Path(out), original.locate(policy)
    check_group_size(group_size)
    task = task_of(read_config(folder))
    if task.is_chain:
        raise MoqaError(f"{policy} is no policy of a robot but for {task.name}", "measure it with moqa profile")
    reader = task.reader(folder)
    sources = [task.split(source)[0] for source in task.sources(data, reader)]
    if not sources:
        raise MoqaError("no demonstrations to profile on", "give at least one --data NAME=FOLDER")
    settings = Settings(context=1, samples=samples, seed=seed, group_size=group_size, method="rtn")
    cut = {source.name: task.cut(source, reader, 1, samples, seed) for source in sources}
    records = {
        source.name: DistributionRecord(
            origin=recorded(source.origin, out), samples=len(cut[source.name].inputs),
            tokens=task.count(cut[source.name].inputs), fitted=Fitted.of(source.digest, cut[source.name].hashes),
        )
        for source in sources
    }  # fmt: skip
    job = as_json({
        "moqa": __version__, "model": fingerprint(folder), "settings": settings.model_dump(mode="json"),
        "data": {name: record.model_dump(mode="json") for name, record in records.items()},
    })  # fmt: skip
    if tidy(out) == job:
        return read_profile(out)
    check_free(out, overwrite)
    view = open_model(folder)
    how = ErrorSettings.of(settings, METHODS["rtn"], experts=1)
    with resumable(out, job, overwrite, restart) as work:
        weights = _weights(view, how)
        statistics = {name: _measured(view, some, how, weights["rounding"], work, report) for name, some in cut.items()}
        record = ProfileRecord(
            moqa=__version__, task=task.name, model=relative(policy, out), model_type=view.model.config.model_type,
            fingerprint=fingerprint(folder),
            kept={n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in view.kept_on_disk().items()},
            left_out=view.left_out(), layers=len(view.blocks), top_k=0, settings=settings, widths=how.widths,
            others=how.others, units=tuple(UnitRecord.of(unit) for unit in view.units.values()),
            distributions=records,
        )  # fmt: skip
        made = Profile(record, work.result, statistics, weights)
        write_profile(made)
        (work.result / PAGE).write_text(render(made), encoding="utf-8")
    return Profile(record, out, statistics, weights)


def combined(shifts: Mapping[str, Tensor], alignment: float) -> Tensor:
    """[units, widths] cost of a plan: shares of alignment and of the actions, each relative to its largest sum.

    >>> table = torch.tensor([[4.0, 1.0], [2.0, 1.0]])
    >>> combined(dict.fromkeys(("shift.module", "shift.layer", "shift.token", "shift.action"), table), 0.5)[0, 0]
    tensor(0.6667)

    Args:
        shifts: tables of a profile, [units, widths] each.
        alignment: share of the three shifts of alignment together; 0 for the output's error alone.
    """
    *levels, action = (_relative(shifts[f"shift.{name}"]) for name in SHIFTS)
    return (1 - alignment) * action + alignment * torch.stack(levels).mean(0)


def _relative(table: Tensor) -> Tensor:
    """A table divided by what all units together cost at the narrowest width."""
    return table / table[:, 0].sum().clamp_min(1e-30)


def _weights(view: ModelView, how: ErrorSettings) -> dict[str, Tensor]:
    layers = range(len(view.blocks))
    return {
        "rounding": torch.cat([relative_errors(view, layer, how) for layer in layers]),
        "compared": torch.cat([compared_errors(view, layer, how.scheme, how.others) for layer in layers]),
    }


def _measured(
    view: ModelView, samples: Samples, how: ErrorSettings, rounding: Tensor, work: ResumableRun, report: Report
) -> dict[str, Tensor]:
    assert isinstance(samples, ObservationSamples)
    name, comparison = samples.name, ShiftComparison(view, samples.inputs)
    parts = {part: [u.name for u in view.units.values() if u.role == part] for part in parts_in(view)}
    jobs: list[tuple[str, Sequence[str], tuple[int, ...]]] = [(f"unit {u}", [u], how.probes) for u in view.units]
    jobs += [(f"part {part}", units, PART_WIDTHS) for part, units in parts.items()]
    found: list[dict[str, list[float]]] = []
    for number, (step, units, widths) in enumerate(jobs):
        report("alignment", number, len(jobs))
        done = work.done(f"{name}: {step}")
        if done is None:
            at = [comparison.shifts(dict.fromkeys(units, _at(how.scheme, width))) for width in widths]
            done = {shift: [one[shift] for one in at] for shift in SHIFTS}
            work.mark_done(f"{name}: {step}", done)
        found.append(done)
    report("alignment", len(jobs), len(jobs))
    of_parts, of_places = gradients(view, samples.inputs, samples.actions)
    tables = {}
    for shift in SHIFTS:
        probed = torch.tensor([one[shift] for one in found[: len(view.units)]])
        tables[f"shift.{shift}"] = all_widths(probed, rounding, how.probes, how.widths)
        tables[f"part.{shift}"] = torch.tensor([one[shift] for one in found[len(view.units) :]])
    return {
        "samples": samples.inputs, **tables, "sensitivity": combined(tables, DEFAULT_ALIGNMENT),
        "gradient.parts": of_parts, "gradient.tokens": of_places,
    }  # fmt: skip


def _at(scheme: Scheme, width: int) -> Scheme:
    return scheme.model_copy(update={"width": width})
