"""`moqa.reduce`: a model with fewer experts per block, as a plain model of transformers, one block at a time."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from moqa import __version__
from moqa.calibration.hidden import HiddenStates
from moqa.data import Data
from moqa.errors import MoqaError
from moqa.format.manifest import CONFIG, Fitted
from moqa.memory.limit import MemoryLimit
from moqa.models.experts import PROJECTIONS, expert_matrix
from moqa.models.layerwise import LayerwiseModel
from moqa.models.load import read_config
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.originals.companions import companions_of, copy_companions
from moqa.originals.fingerprint import fingerprint
from moqa.originals.hub import INDEX
from moqa.originals.reader import OriginalReader
from moqa.progress import Report, quiet
from moqa.reduction.merge import ExpertMatrices, merged
from moqa.reduction.record import REDUCTION, ReductionRecord
from moqa.reduction.registry import DEFAULT_REDUCTION, DROPPED, REDUCTIONS, Routed
from moqa.reduction.seen import router_of, seeing
from moqa.storage.artifact import write_json, write_sealed
from moqa.storage.folders import check_free
from moqa.storage.paths import recorded
from moqa.storage.resumable import ResumableRun, as_json, check_space, resumable, tidy
from moqa.tasks import task_of
from moqa.tasks.names import routes_in_groups, with_experts

_SLACK = 2**20


@torch.no_grad()
def reduce(
    model: str | Path,
    experts: int,
    data: Data,
    out: str | Path,
    *,
    by: str = DEFAULT_REDUCTION,
    samples: int = 64,
    context: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    report: Report = quiet,
) -> Path:
    """Make a model with fewer routed experts per block, by how its router treats some texts.

    >>> moqa.reduce("reference/model", 8, {"wiki": "wiki.txt"}, "runs/eight", samples=2, context=32)
    PosixPath('runs/eight')

    Args:
        model: folder or Hub id of the original.
        experts: of each block of the result.
        data: texts of the task, as distributions or name -> source; no others decide anything.
        out: folder to make: a model of transformers, with the original's names, dtypes and tokenizer.
        by: member of `moqa.reduction.REDUCTIONS`.
        samples: windows of each text.
        context: tokens in a window.
        seed: of the choice of windows, and of what a way draws.
        overwrite: replace a folder that exists at `out`.
        restart: discard what an earlier run has finished.
        report: called with the name of a step, how much of it is done, and its total.

    Raises:
        MoqaError: if the model has no routed experts, a token uses more of them than are asked for, its router cannot
            be reduced, or a text is unusable.

    UNCURL (arXiv 2409.01483); what is ours stands in docs/methods/reduce.md.
    """
    out, member = Path(out), REDUCTIONS.find(by)
    check_free(out, overwrite)
    folder = original.locate(model)
    task = task_of(read_config(folder))
    reader = task.reader(folder)
    texts = task.sources(data, reader)
    if not texts:
        raise MoqaError("no text to reduce the experts for", "give at least one --data NAME=FILE")
    view = open_model(folder, keep=MemoryLimit.free().holds(OriginalReader(folder).values))
    layers, before = _checked(view, str(model), experts)
    cut = {text.name: task.cut(text, reader, context, samples, seed) for text in texts}
    fitted = {text.name: Fitted.of(text.digest, cut[text.name].hashes) for text in texts}
    identity = fingerprint(folder)
    job = as_json({
        "moqa": __version__, "model": identity, "experts": experts, "by": by, "seed": seed, "context": context,
        "texts": {name: text.model_dump() for name, text in fitted.items()},
    })  # fmt: skip
    if tidy(out) == job:
        return out
    check_space(out, sum(path.stat().st_size for path in original.weight_files(folder)) + _SLACK)
    companions = companions_of(folder)
    with resumable(out, job, overwrite, restart) as work:
        inputs = torch.cat([cut[text.name].inputs for text in texts])
        stages, depth = LayerwiseModel(view.model), len(view.blocks)
        hidden = HiddenStates(stages, work, "task", task.batches(inputs))
        for layer in range(depth):
            report("reduce", layer, depth)
            if work.done(_step(layer)) is None:
                facts = _reduce_block(view, layer, hidden, work, lambda seen: member.rule(seen, experts, seed))
                work.mark_done(_step(layer), facts)
            hidden.forget(layer)
        report("reduce", depth, depth)
        done = {layer: _done(work, layer) for layer in range(depth)}
        kept = _kept(view, {layer: done[layer] for layer in layers}, before)
        files = dict.fromkeys(_write(view, kept, work.result / _file(0, depth)), _file(0, depth))
        files |= {name: _file(layer + 1, depth) for layer in done for name in done[layer]["names"]}
        write_json({"metadata": {}, "weight_map": files}, work.result / INDEX)
        copy_companions(folder, companions, work.result)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # the weights are written in the dtypes of the original's values, also where it stores fewer bits
        config.pop("quantization_config", None)
        write_json(with_experts(config, before, experts), work.result / CONFIG)
        write_sealed(ReductionRecord(
            moqa=__version__, model=recorded(str(model), out), fingerprint=identity, by=by, experts=experts,
            before=before, groups={layer: tuple(done[layer]["groups"]) for layer in layers}, fitted=fitted, seed=seed,
        ), work.result / REDUCTION)  # fmt: skip
        open_model(work.result, keep=False)  # refuses names or shapes that transformers would not read
    return out


def _checked(view: ModelView, model: str, experts: int) -> tuple[list[int], int]:
    """Blocks with routed experts, and how many they have.

    Raises:
        MoqaError: if they cannot be reduced to a number.
    """
    if not view.has_experts:
        raise MoqaError(f"{model} ({view.model.config.model_type}) has no routed experts", "there is nothing to reduce")
    layers = [layer for layer in range(len(view.blocks)) if view.experts_path(layer) is not None]
    counts = sorted({view.experts(layer).num_experts for layer in layers})
    if len(counts) > 1:
        raise MoqaError(
            f"blocks of {model} have {' or '.join(map(str, counts))} experts", "they must have equally many"
        )
    if experts < view.top_k:
        raise MoqaError(
            f"--experts {experts} is fewer than the {view.top_k} experts that a token uses in {model}",
            f"give {view.top_k} to {counts[0] - 1}",
        )
    if experts >= counts[0]:
        raise MoqaError(f"--experts {experts}: {model} has {counts[0]}", f"give {view.top_k} to {counts[0] - 1}")
    if routes_in_groups(view.model.config):
        raise MoqaError(f"{model} chooses experts within groups of them", "experts of such a family cannot be reduced")
    for layer in layers:
        router_of(view, layer)
        if getattr(view.experts(layer), "has_bias", False):
            raise MoqaError(f"experts of {model} have biases", "experts of such a family cannot be reduced yet")
    return layers, counts[0]


def _reduce_block(
    view: ModelView, layer: int, hidden: HiddenStates, work: ResumableRun, rule: Callable[[Routed], Tensor]
) -> dict[str, object]:
    """Run a block, write its units with fewer experts, and return what is recorded of it."""
    if view.experts_path(layer) is None:
        hidden.advance(layer)
        seen, groups = None, []
    else:
        with seeing(view, layer) as router:
            hidden.advance(layer)
        seen = router.result()
        groups = rule(seen).tolist()
    parameters = {unit.parameter: unit for unit in view.block_units(layer)}
    view.need(layer)
    state = {
        name: view.model.get_parameter(name).detach().to(view.stored_dtype(unit))
        for name, unit in parameters.items()
        if unit.expert is None
    }
    if seen is not None:
        state |= _stacked(view, layer, groups, seen)
    path = work.result / _file(layer + 1, len(view.blocks))
    names = _write(view, state, path)
    return {"names": names, "groups": groups, "tokens": [] if seen is None else seen.tokens.tolist()}


def _stacked(view: ModelView, layer: int, groups: Sequence[int], seen: Routed) -> dict[str, Tensor]:
    """The stacked parameters of a block's new experts."""
    module = view.experts(layer)
    units = {(unit.expert, unit.projection): unit for unit in view.block_units(layer) if unit.expert is not None}
    count = max(groups) + 1
    new = SimpleNamespace(
        is_transposed=module.is_transposed, is_concatenated=module.is_concatenated,
        **{name: torch.empty((count, *getattr(module, name).shape[1:])) for name in ("gate_up_proj", "down_proj")},
    )  # fmt: skip
    for index in range(count):
        members = [expert for expert, group in enumerate(groups) if group == index]
        parts = [
            ExpertMatrices(
                *(view.weight(units[expert, name]).float() for name in ("gate_proj", "up_proj", "down_proj"))
            )
            for expert in members
        ]
        one = merged(parts, seen.tokens[members])
        for name, matrix in zip(PROJECTIONS, (one.gate, one.up, one.down), strict=True):
            expert_matrix(new, index, name).copy_(matrix)
    return {
        units[0, projection].parameter: getattr(new, name).to(view.stored_dtype(units[0, projection]))
        for name, projection in (("gate_up_proj", "gate_proj"), ("down_proj", "down_proj"))
    }


def _kept(view: ModelView, done: Mapping[int, dict], before: int) -> dict[str, Tensor]:
    """Tensors that are no units, with the rows of routers merged as their experts are."""
    kept = dict(view.kept_on_disk())
    paths = {id(module): path for path, module in view.model.named_modules()}
    for layer, facts in done.items():
        roots = [paths[id(router_of(view, layer))], str(view.experts_path(layer))]
        for name, tensor in kept.items():
            inside = any(name.startswith(f"{root}.") for root in roots)
            if inside and tensor.dim() and len(tensor) == before:
                kept[name] = merged_rows(tensor, facts["groups"], torch.tensor(facts["tokens"]))
    return kept


def merged_rows(rows: Tensor, groups: Sequence[int], tokens: Tensor) -> Tensor:
    """Rows of experts that become one, averaged by the tokens that they get.

    >>> merged_rows(torch.tensor([[1.0], [3.0], [9.0]]), [0, 0, -1], torch.tensor([1, 1, 5]))
    tensor([[2.]])

    Args:
        rows: [experts, ...].
        groups: new expert of each; -1 for those that are dropped.
        tokens: [experts]; if those of a group got none, all of them weigh the same.
    """
    found = []
    for index in range(max(groups) + 1):
        members = [expert for expert, group in enumerate(groups) if group == index != DROPPED]
        shares = tokens[members].double() if int(tokens[members].sum()) else torch.ones(len(members)).double()
        found.append(torch.tensordot(shares / shares.sum(), rows[members].double(), 1))
    return torch.stack(found).to(rows.dtype)


def _write(view: ModelView, state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Write parameters with the names and layouts that the family has on disk; returns the names."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {n: t.contiguous() for n, t in revert_weight_conversion(view.model, dict(state)).items()}
    save_file({name: tensor.clone() for name, tensor in found.items()}, path, {"format": "pt"})
    path.chmod(0o644)
    return sorted(found)


def _done(work: ResumableRun, layer: int) -> dict:
    facts = work.done(_step(layer))
    assert facts is not None
    return facts


def _step(layer: int) -> str:
    return f"layer-{layer}"


def _file(number: int, depth: int) -> str:
    return f"model-{number + 1:05}-of-{depth + 1:05}.safetensors"
