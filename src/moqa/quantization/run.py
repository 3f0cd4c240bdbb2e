"""`moqa.quantize`: apply a plan, block by block, and write the checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from moqa import __version__
from moqa.errors import MoqaError
from moqa.execution import Executor, LocalExecutor, Workspace
from moqa.execution.background import background
from moqa.forecast.disk import largest_block_bytes, quantization_disk_bytes
from moqa.forecast.working_set import WorkingSet
from moqa.format.cache import write_cache
from moqa.format.writer import introduce
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import settle
from moqa.methods import Method
from moqa.methods.registry import METHODS
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.companions import companions_of, copy_companions
from moqa.originals.fingerprint import differing_part, fingerprint
from moqa.planning import ENGINES, Plan, check_profile
from moqa.planning.account import kept_entries
from moqa.profiling import Profile, read_profile
from moqa.progress import Report, quiet
from moqa.quantization.cache import cache_layers, describe_routing, parse_cache
from moqa.quantization.checkpoint import CheckpointWriter, UnitWriter
from moqa.quantization.layer import QuantizedUnit
from moqa.quantization.nested import narrower_widths, shards_of_narrower
from moqa.quantization.pieces import BlockWork, quantized_layers
from moqa.quantization.samples import CalibrationSamples, tokens_of
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded
from moqa.storage.resumable import as_json, check_space, resumable, tidy


def quantize(
    model: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    method: str = "gptq",
    overwrite: bool = False,
    report: Report = quiet,
    profile: Profile | None = None,
    view: ModelView | None = None,
    cache: str | None = None,
    memory: MemoryLimit | None = None,
    restart: bool = False,
    engine: Executor | None = None,
    widths_nested: Sequence[int] = (),
) -> Path:
    """Quantize a model by a plan and write it as a checkpoint, one block at a time.

    >>> moqa.quantize("reference/model", plan, "runs/quantized", method="rtn", profile=profile)
    PosixPath('runs/quantized')

    When a run that was killed is started again, it continues after the last finished block; the bytes are the same.

    Args:
        model: folder or Hub id of the original that the plan was made for.
        plan: scheme of every unit.
        out: folder to create.
        method: one of `moqa.quantization.METHODS`.
        overwrite: replace a checkpoint that exists at `out`.
        report: called with the name of a step, how much of it is done, and its total.
        profile: the plan's profile, which holds the samples; None reads it from the folder that the plan names.
        view: the model, if it is already open.
        cache: what to keep of the original for adjustments: a share of the channels such as `1%`, or `full`.
        memory: what a process may use; None means all free memory.
        restart: start again from the beginning and discard what an earlier run has finished.
        engine: where the work is done (`moqa.execution.find_executor`); None means in this process.
        widths_nested: at which the checkpoint can be used: that of a uniform plan, and narrower ones.

    Raises:
        MoqaError: if the plan is for another model, the method is unknown, the samples are missing, the memory is too
            small, the plan cannot hold the nested widths, or `out` exists or holds an unfinished run with other
            options.
    """
    out = Path(out)
    how = METHODS.find(method)
    _check_engine(plan)
    narrower = narrower_widths(widths_nested, plan)
    share = None if cache is None else parse_cache(cache)
    check_free(out, overwrite)
    folder = original.locate(model)
    companions = companions_of(folder)
    other = differing_part(folder, plan.fingerprint)
    if other:
        raise MoqaError(
            f"the plan is for {plan.model} ({plan.model_type})",
            f"{model} is another model, with other {other}: plan from its own profile",
        )
    # even if the method needs no data, the plan was fitted on texts, whose hashes go into the manifest
    profile = profile or _profile_of(plan)
    check_profile(plan, profile)
    view = view or open_model(folder, keep=False)
    _check_units(view, profile)
    job = as_json(_job(folder, plan, profile, how, cache) | ({"nested": narrower} if narrower else {}))
    if tidy(out) == job:
        return out
    check_free(out, overwrite)
    executor = engine or LocalExecutor()
    settle()
    room = WorkingSet.to_quantize(
        executor.memory(memory), view, how, tokens_of(plan, profile), largest_block_bytes(view, plan.units)
    )
    more = sum(shard.bytes for shards in shards_of_narrower(view, plan, narrower).values() for shard in shards)
    check_space(out, disk_needed(view, plan, profile, how, cache) + more)
    executor.prepare(folder, out, report)
    with torch.no_grad(), resumable(out, job, overwrite, restart) as work:
        writer = CheckpointWriter(view, work, plan, profile, how, narrower)
        missing = writer.widths[0].missing()
        if missing and room.ahead and executor.name == "local":
            view.read_ahead(missing[0])
        if work.done("start") is None:
            copy_companions(folder, companions, work.result)
            introduce(work.result, _recipe(plan, how))
            hashed = dict[str, str]()
            if cache is not None:
                report("cache", 0, 1)
                layers = cache_layers(view, profile, plan.known, share)
                hashed = write_cache(work.result, plan.fingerprint, share, len(view.blocks), layers)
                report("cache", 1, 1)
            describe_routing(work.result, profile, plan.known)
            work.mark_done("start", {}, hashed)
        if work.done("kept") is None:
            writer.write_kept(view.kept_on_disk())
        for units in writer.widths:
            if not units.missing():
                continue
            samples = CalibrationSamples(view, plan.mixture, profile, work, units.name) if how.needs_data else None
            todo = BlockWork(
                Workspace(view, work), units.schemes, how, executor, room.experts, report,
                None if units.wide is None else units.wide.stored,
            )  # fmt: skip
            _write_width(units, todo, samples, room.ahead)
        writer.finish(recorded(model, out))
        report("quantize", writer.depth, writer.depth)
    return out


def _write_width(units: UnitWriter, todo: BlockWork, samples: CalibrationSamples | None, ahead: bool) -> None:
    """Quantize and write what is missing of a width, one layer after the other."""
    depth, missing = len(units.layout), units.missing()

    def finish(layer: int, done: Mapping[str, QuantizedUnit]) -> None:
        """Write a quantized layer, store the hidden states after it, and record that it is done."""
        written = units.write_layer(layer, done)
        if samples and layer + 1 < depth:
            samples.advance(layer, done, units.schemes)
        units.mark_done(layer, written)
        if samples:
            samples.forget(layer)

    with background(ahead) as do, closing(quantized_layers(todo, samples, missing)) as results:
        for layer in missing:
            todo.report("quantize", layer, depth)
            do(finish, layer, next(results))


def _check_engine(plan: Plan) -> None:
    """Refuse a plan whose units a checkpoint cannot store."""
    foreign = next((name for name, scheme in plan.units.items() if scheme.is_foreign), None)
    if foreign is not None:
        raise MoqaError(
            f"the plan is for {plan.engine}: {foreign} is stored as {plan.units[foreign].encoding}",
            f"moqa export PLAN --to {ENGINES[plan.engine].export} -o FILE writes it",
        )


def _recipe(plan: Plan, method: Method) -> dict[str, object]:
    """What `config.json` says about how the units are stored."""
    schemes = [scheme for scheme in plan.units.values() if not scheme.is_unquantized]
    return {
        "strategy": plan.strategy, "budget": plan.budget, "method": method.name,
        "bits_per_weight": round(plan.account.bits_per_weight, 4),
        "widths": sorted({scheme.width for scheme in plan.units.values()}),
        "group_sizes": sorted({scheme.group_size for scheme in schemes}),
    }  # fmt: skip


def disk_needed(view: ModelView, plan: Plan, profile: Profile, method: Method, cache: str | None) -> int:
    """Peak disk space in bytes of a run of `quantize` with these arguments.

    >>> disk_needed(view, plan, profile, METHODS["gptq"], None) > plan.account.checkpoint
    True
    """
    share = 0.0 if cache is None else parse_cache(cache)
    tokens = tokens_of(plan, profile) if method.needs_data else 0
    return quantization_disk_bytes(view, plan.account.checkpoint, tokens, 1.0 if share is None else share)


def _job(folder: Path, plan: Plan, profile: Profile, method: Method, cache: str | None) -> dict:
    """Everything that a checkpoint's bytes depend on."""
    digest = hashlib.sha256(plan.model_dump_json(exclude={"profile", "model"}).encode()).hexdigest()
    return {"moqa": __version__, "model": fingerprint(folder), "plan": digest, "samples": profile.digest(plan.mixture),
            "gradients": _digest(profile, plan), "method": method.name, "cache": cache}  # fmt: skip


def _digest(profile: Profile, plan: Plan) -> str:
    """Hash of the gradients that a checkpoint depends on."""
    digest = hashlib.sha256()
    for layer in range(profile.record.layers):
        found = profile.gradients(layer, plan.mixture)
        if found is not None:
            digest.update(found.rows.numpy().tobytes() + found.rest.numpy().tobytes())
    return digest.hexdigest()


def _profile_of(plan: Plan) -> Profile:
    try:
        return read_profile(plan.profile)
    except MoqaError as error:
        raise MoqaError("the plan's samples are missing", f"{error}; give the folder with --profile") from None


def _check_units(view: ModelView, profile: Profile) -> None:
    """Refuse a profile of other units or kept tensors than the model has."""
    found = {(name, -1, shape) for name, (_, shape) in kept_entries(profile).items()}
    found |= {(unit.name, unit.layer, unit.shape) for unit in profile.record.units}
    wanted = {(name, -1, shape) for name, (_, shape) in view.kept_entries().items()}
    wanted |= {(unit.name, unit.layer, unit.shape) for unit in view.units.values()}
    if found != wanted:
        name, *_ = min(found ^ wanted)
        raise MoqaError(f"profile {profile.folder} and the model differ in {name}", "profile the model again")
