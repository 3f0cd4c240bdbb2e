"""`moqa.quantize`: apply a plan, layer by layer, and write the checkpoint."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moqa import __version__
from moqa.errors import MoqaError
from moqa.format.cache import write_cache
from moqa.format.layout import shards
from moqa.format.manifest import MANIFEST, Manifest, StoredFile, StoredTensor, StoredUnit
from moqa.format.writer import check_free, finished_folder, introduce, write_index, write_manifest, write_shard
from moqa.methods import Method
from moqa.methods.inputs import Inputs, Part, gather_inputs
from moqa.methods.registry import find_method
from moqa.models import checkpoint
from moqa.models.stages import Stages
from moqa.models.view import ModelView, open_model
from moqa.plan import Plan
from moqa.profile import Profile, read_profile
from moqa.profile.measure import batches
from moqa.progress import Report, quiet
from moqa.quantize.cache import cache_layers, parse_cache
from moqa.quantize.layer import Quantized, quantize_units
from moqa.quantize.routing import describe_routing

# one window in this many decides between methods and is not fitted on
_CHECK_EVERY = 8
# small files of the original that a transformers model needs beside its weights
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


def quantize(
    model: str | Path,
    plan: Plan,
    out: str | Path,
    method: str = "gptq",
    overwrite: bool = False,
    report: Report = quiet,
    profile: Profile | None = None,
    view: ModelView | None = None,
    cache: str | None = None,
) -> Path:
    """Quantize a model by a plan and write it as a checkpoint.

    >>> moqa.quantize("reference/model", plan, "runs/out", method="gptq")
    PosixPath('runs/out')

    Args:
        model: folder or Hub id of the original model, the one that the plan was made for.
        plan: scheme of every unit.
        out: folder to make.
        method: one of `moqa.quantize.METHODS`.
        overwrite: replace a checkpoint that is there.
        report: called with what is done, how much of it, and of how much.
        profile: the plan's profile, which holds the samples; None reads it from where the plan says.
        view: the model, if it is open already; its weights are overwritten and restored.
        cache: what to keep of the original for adjustments: a share of the channels such as `1%`, or `full`.

    Raises:
        MoqaError: if the plan is for another model, the method unknown, the samples are missing, or `out` is taken.
    """
    out = Path(out)
    how = find_method(method)
    share = None if cache is None else parse_cache(cache)
    check_free(out, overwrite)
    folder = checkpoint.locate(model)
    fingerprint = checkpoint.fingerprint(folder)
    if fingerprint != plan.fingerprint:
        raise MoqaError(
            f"the plan is for {plan.model} ({plan.model_type}, {plan.fingerprint[:8]})",
            f"{model} is another model ({fingerprint[:8]}): plan from its own profile",
        )
    # also a method that needs no data comes from a plan that was fitted on texts: their hashes go into the manifest
    profile = profile or _profile_of(plan)
    _check_profile(profile, plan)
    view = view or open_model(folder)
    _check_units(view, plan)
    original = {name: view.weight(unit).clone() for name, unit in view.units.items()}
    try:
        with torch.no_grad(), finished_folder(out, overwrite) as target:
            for pattern in _COMPANIONS:
                for path in sorted(folder.glob(pattern)):
                    if path.name != checkpoint.INDEX:
                        shutil.copyfile(path, target / path.name)
            introduce(target)
            if cache is not None:
                report("cache", 0, 1)
                write_cache(target, plan.fingerprint, share, cache_layers(view, profile, plan.known, share))
            describe_routing(target, profile, plan.known)
            _write(view, plan, how, profile, target, model, report)
    finally:
        for name, weight in original.items():
            view.set_weight(view.units[name], weight)
    return out


def _write(
    view: ModelView, plan: Plan, method: Method, profile: Profile, target: Path, model: str | Path, report: Report
) -> None:
    kept = view.kept_on_disk()
    layout = shards(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()},
        len(view.layers),
        {name: (unit.layer, unit.shape, plan.units[name]) for name, unit in view.units.items()},
    )
    files: dict[str, StoredFile] = {layout[0].file: write_shard(target, layout[0], kept)}
    units: dict[str, StoredUnit] = {}
    flow = _Flow(view, plan, profile) if method.needs_data else None
    for layer in range(len(view.layers)):
        report("quantize", layer, len(view.layers))
        shard, done = layout[layer + 1], _quantize_layer(view, plan, method, flow, layer)
        files[shard.file] = write_shard(target, shard, _tensors(done))
        for name, result in done.items():
            unit = view.units[name]
            units[name] = StoredUnit(
                layer=layer, role=unit.role, shape=unit.shape, scheme=plan.units[name], method=result.method,
                error=None if result.error is None else float(f"{result.error:.6g}"),
            )  # fmt: skip
    if sum(file.bytes for file in files.values()) != plan.account.checkpoint:
        raise RuntimeError(f"wrote {sum(f.bytes for f in files.values())} bytes, planned {plan.account.checkpoint}")
    fitted = {n: r.fitted for n, r in profile.record.distributions.items() if n in plan.known and r.fitted is not None}
    manifest = Manifest(
        moqa=__version__, model=str(model), model_type=plan.model_type, fingerprint=plan.fingerprint,
        layers=len(view.layers), strategy=plan.strategy, options=plan.options.model_dump(), ties=plan.ties,
        budget=plan.budget, method=method.name, seed=profile.record.settings.seed, mixture=plan.mixture,
        fitted=fitted,
        units=units, kept={n: StoredTensor(dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
                           for n, t in kept.items()},
        files=files,
    )  # fmt: skip
    write_manifest(manifest, target / MANIFEST)
    write_index(manifest, target)
    report("quantize", len(view.layers), len(view.layers))


def _quantize_layer(
    view: ModelView, plan: Plan, method: Method, flow: "_Flow | None", layer: int
) -> dict[str, Quantized]:
    units = view.layer_units(layer)
    inputs = flow.inputs(layer) if flow else {}
    done = {unit.name: result for unit, result in quantize_units(view, units, plan.units, method, inputs)}
    for unit in units:
        view.set_weight(unit, done[unit.name].dense)
    if flow and layer + 1 < len(view.layers):
        flow.advance(layer)
    return done


class _Flow:
    """The samples' hidden states on their way through the model, quantized as far as it is."""

    def __init__(self, view: ModelView, plan: Plan, profile: Profile) -> None:
        self._view, self._stages = view, Stages(view.model)
        self._parts: list[Part] = []
        # in an order that a plan read from a file has too: sums of floats depend on it
        for name, share in sorted(plan.mixture.items()):
            tokens = profile.samples(name)
            check = _held_out(len(tokens))
            for held, windows in ((False, tokens[~check]), (True, tokens[check])):
                for batch in batches(windows) if len(windows) else ():
                    # every distribution counts by its share, however many samples it has
                    self._parts.append(Part(self._stages.embed(batch), share / windows.numel(), held))

    def inputs(self, layer: int) -> dict[str, Inputs]:
        """Inputs of all units of a layer; the layer's weights are still the original ones."""
        return gather_inputs(self._view, self._stages, layer, self._parts)

    def advance(self, layer: int) -> None:
        """Move the hidden states past a layer that is quantized now."""
        self._parts = [replace(part, hidden=self._stages.layer(layer, part.hidden)) for part in self._parts]


def _held_out(windows: int) -> Tensor:
    """[windows] which windows are not fitted on: one in eight, and one of fewer; a single one is fitted on."""
    every = min(_CHECK_EVERY, windows)
    return torch.arange(windows) % every == every - 1 if windows > 1 else torch.zeros(windows, dtype=torch.bool)


def _tensors(done: Mapping[str, Quantized]) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": tensor for name, result in done.items() for suffix, tensor in result.tensors.items()}


def _profile_of(plan: Plan) -> Profile:
    try:
        return read_profile(plan.profile)
    except MoqaError as error:
        raise MoqaError("the plan's samples are missing", f"{error}; give the folder with --profile") from None


def _check_profile(profile: Profile, plan: Plan) -> None:
    absent = [name for name in (*plan.known, *plan.mixture) if name not in profile.statistics]
    if profile.record.fingerprint != plan.fingerprint or absent:
        lack = f"lacks {', '.join(dict.fromkeys(absent))}" if absent else f"is of {profile.record.model}"
        raise MoqaError(f"profile {profile.folder} {lack}", "it is not the one the plan was made from")


def _check_units(view: ModelView, plan: Plan) -> None:
    different = sorted(view.units.keys() ^ plan.units.keys())
    if different:
        where = "the plan" if different[0] in view.units else "the model"
        raise MoqaError(f"{where} lacks unit {different[0]}", f"{len(different)} units differ between model and plan")
