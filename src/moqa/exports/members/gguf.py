"""`gguf`: a model for llama.cpp, in the types of a plan."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moqa import __version__
from moqa.errors import MoqaError
from moqa.exports.importance import Importance, ImportanceSamples, weights_of
from moqa.exports.registry import ExportJob, exports
from moqa.exports.sources import opened, planned
from moqa.exports.work import file_of_work
from moqa.format.scheme import Scheme
from moqa.gguf import GgufFile, find_family
from moqa.methods.ggml import encode, encoders
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.planning import Plan
from moqa.planning.gguf_layout import file_of
from moqa.storage.resumable import ResumableRun
from moqa.tasks.names import depth


@exports("gguf")
def gguf(job: ExportJob) -> list[str]:
    """A model for llama.cpp, in the types of a plan: ggml's encoders, with the squared inputs of the profile's samples.

    Every matrix is rounded as `llama-quantize` would round it in its type and with this importance, byte for byte.
    """
    encoders()
    plan, profile = planned(job, "llama.cpp")
    view = opened(job, profile)
    assert view.folder is not None
    units = {unit.name: (unit.shape, plan.units[unit.name], _plain(view, unit)) for unit in view.units.values()}
    file = file_of(view.folder, view.kept_entries(), units)
    if file.bytes != plan.account.checkpoint:
        raise MoqaError(
            f"{job.out} would have {file.bytes} bytes, the plan says {plan.account.checkpoint}", "plan again"
        )
    digest = hashlib.sha256(plan.model_dump_json(exclude={"profile", "model"}).encode()).hexdigest()
    facts = {"moqa": __version__, "to": "gguf", "plan": digest, "samples": profile.digest(plan.mixture)}
    layers = len(view.blocks)
    with torch.no_grad(), file_of_work(job, facts, 2 * file.bytes) as (work, path):
        samples = ImportanceSamples(view, plan.mixture, profile, work)
        for layer in range(layers):
            if work.done(f"layer-{layer}") is None:
                job.report("export", layer, layers)
                seen = samples.of_layer(layer)
                work.save(f"layer-{layer}", _encoded(view, layer, plan, seen))
                work.mark_done(f"layer-{layer}", {})
                samples.forget(layer)
        job.report("export", layers, layers)
        file.write(path, _data(view, file, work))
        if path.stat().st_size != plan.account.checkpoint:
            raise RuntimeError(f"wrote {path.stat().st_size} bytes, planned {plan.account.checkpoint}")
    left = [f"llama.cpp gets no {prefix} ({count:,} values): transformers' model has none" for prefix, count in
            view.left_out().items()]  # fmt: skip
    return [f"{plan.account.bits_per_weight:.3f} bits per weight, {file.bytes} bytes as planned", *left]


def _encoded(view: ModelView, layer: int, plan: Plan, seen: Mapping[str, Importance]) -> dict[str, Tensor]:
    """llama.cpp's name -> data of the units of a layer; experts are stacked."""
    config = view.model.config
    family, stacks = find_family(config), dict[str, list[Unit]]()
    for unit in view.block_units(layer):
        stacks.setdefault(family.name(f"{unit.name}.weight", depth(config)), []).append(unit)
    found = {}
    for name, units in stacks.items():
        scheme = plan.units[units[0].name]
        importance = weights_of(seen, [unit.name for unit in units], units[0].shape[1])
        rows = [
            _rows(family.ordered(name, view.weight(unit).float(), config), scheme, _plain(view, unit),
                  importance[unit.name])
            for unit in units
        ]  # fmt: skip
        found[name] = torch.stack(rows)
    return found


def _rows(weights: Tensor, scheme: Scheme, plain: torch.dtype, importance: Tensor) -> Tensor:
    if scheme.is_unquantized:
        return weights.to(plain)
    return encode(weights, scheme.encoding, importance)


def _plain(view: ModelView, unit: Unit) -> torch.dtype:
    """Dtype of a unit that is not quantized: 16 bits."""
    return torch.float16 if view.stored_dtype(unit) == torch.float16 else torch.bfloat16


def _data(view: ModelView, file: GgufFile, work: ResumableRun) -> Iterator[Tensor]:
    """The data of a file's tensors, in their order."""
    config = view.model.config
    family = find_family(config)
    kept = {family.name(name, depth(config)): tensor for name, tensor in view.kept_on_disk().items()}
    layers: dict[int, dict[str, Tensor]] = {}
    for tensor in file.tensors:
        if tensor.name in kept:
            yield family.ordered(tensor.name, kept[tensor.name], config).reshape(tensor.shape).to(_dtype(tensor.kind))
            continue
        layer = int(tensor.name.split(".")[1])
        if layer not in layers:
            layers = {layer: work.load(f"layer-{layer}")}
        yield layers[layer][tensor.name]


def _dtype(kind: str | torch.dtype) -> torch.dtype:
    assert isinstance(kind, torch.dtype)
    return kind
