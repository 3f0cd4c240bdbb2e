"""`moqa.load`: a checkpoint as a transformers model whose weights stay packed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError, one_line
from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.kernels import KERNELS, PackedMatrix, ProductKernels, check_encoding, find_kernels
from moqa.models.building import BUILDING, empty_model
from moqa.models.load import read_generation_config
from moqa.models.view import ModelView
from moqa.runtime.adjusted import make_adjustable
from moqa.runtime.fixed import keep_packed
from moqa.runtime.packed import KeptEmbedding, PackedLinear, packed_parts
from moqa.runtime.variants import Variants
from moqa.tasks import task_of
from moqa.tasks.configuration import read_configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    folder: str | Path,
    *,
    verify: bool = True,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
    device: str | torch.device = "cpu",
    width: int | None = None,
) -> "tuple[PreTrainedModel, Any]":
    """Load a checkpoint.

    >>> model, tokenizer = moqa.load("runs/out")
    >>> output = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8)
    >>> text = tokenizer.decode(output[0])

    Weights are mapped from the files, not copied: units stay packed, and embeddings stay in their stored dtype.

    Args:
        folder: of the checkpoint, or its Hub id.
        verify: check the files' hashes first, which reads every byte, and that the model runs.
        dtype: of activations: float32 or bfloat16.
        kernels: `native`, `triton`, `reference`, or `auto`: the fastest that run on the device.
        device: where to compute; weights are copied there unless it is the CPU.
        width: of a checkpoint with nested widths: the one to compute with, whose units are then made in memory; None
            means the widest.

    Returns:
        A transformers model whose units are packed, and its tokenizer or image processor.

    Raises:
        MoqaError: if the checkpoint is damaged or does not match its own configuration, lacks the width, or the kernels
            do not run here.
    """
    checkpoint = open_checkpoint(folder, verify, width)
    model = load_packed(checkpoint, dtype=dtype, kernels=kernels, device=device)
    if verify:
        _check_runs(model, checkpoint.folder)
    return model, task_of(model.config).processor(checkpoint.folder)


def load_packed(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
    device: str | torch.device = "cpu",
) -> "PreTrainedModel":
    """The model of a checkpoint that has been checked; see `load`."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise MoqaError(f"dtype {dtype} is not supported for activations", "choose float32 or bfloat16")
    with BUILDING:
        return _build(checkpoint, dtype, kernels, device)


def _build(checkpoint: Checkpoint, dtype: torch.dtype, kernels: str, device: str | torch.device) -> "PreTrainedModel":
    config = read_configuration(checkpoint.folder)
    try:
        task = task_of(config, checkpoint.folder)
        depth = task.depth(config)
        if depth != checkpoint.manifest.layers:  # checked before a model of that depth is built
            raise ValueError(f"{depth} layers, the manifest has {checkpoint.manifest.layers}")
        model = empty_model(config, dtype)
    except Exception as error:  # on a foreign configuration, transformers raises all kinds of exceptions
        raise MoqaError(f"{checkpoint.folder} has no usable config.json", one_line(error)) from None
    chosen = choose_kernels(kernels, device)
    install_units(model, checkpoint, chosen)
    stored = checkpoint.layer(None)
    _check_kept(model, stored, checkpoint.folder)
    wanted, mapped = model.state_dict(), _tables(model, stored)
    wide = {n: t for n, t in stored.items() if n in wanted and n not in mapped and t.is_floating_point()}
    state = {**stored, **{n: t.to(wanted[n].dtype) for n, t in wide.items()}}
    report = model.load_state_dict(state, strict=False, assign=True)
    # as transformers does: an embedding and a head that are both stored stay apart, whatever config.json says
    model.tie_weights(missing_keys=set(report.missing_keys), recompute_mapping=False)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if report.unexpected_keys or left:
        name = (report.unexpected_keys or left)[0]
        raise MoqaError(f"{checkpoint.folder}: {name} does not fit config.json", "one of the two was changed")
    keep_as_stored(model, stored, dtype, chosen)
    if task.writes_samples:
        read_generation_config(model, checkpoint.folder)
    keep_packed(model, checkpoint.folder)
    return model.requires_grad_(False).to(device)


def _check_runs(model: "PreTrainedModel", folder: Path) -> None:
    """Refuse a configuration that fits all tensors and fails all the same when the model computes."""
    try:
        with torch.no_grad():
            task = task_of(model.config)
            probe = task.probe(model).to(model.device)
            # a chain as its users call it: with its cache
            model(probe) if task.is_chain else task.call(model, probe)
    except Exception as error:  # whatever a forward pass raises
        raise MoqaError(f"{folder} does not run as its config.json says", one_line(error)) from None


def install_units(model: "PreTrainedModel", checkpoint: Checkpoint, kernels: ProductKernels) -> None:
    """Replace a model's matrices with the packed units of a checkpoint.

    Raises:
        MoqaError: if the model has other units than the checkpoint, or the kernels do not multiply their encodings.
    """
    view = ModelView(model)
    stored_as = _check_units(view, checkpoint)
    variants, with_experts = Variants(), []
    for layer in range(len(view.blocks)):
        tensors = checkpoint.layer(layer)
        matrices: dict[str, PackedMatrix] = {}
        for unit in view.block_units(layer):
            name = stored_as[unit.name]
            scheme = checkpoint.manifest.units[name].scheme
            matrices[unit.name] = PackedMatrix(scheme, unit.shape, scheme.among(tensors, name, unit.shape))
            check_encoding(kernels, matrices[unit.name])
        for owner, name, packed in packed_parts(view, layer, matrices, kernels, variants):
            setattr(owner, name, packed)
        for parameter in {unit.parameter for unit in view.block_units(layer)}:
            path, _, name = parameter.rpartition(".")
            module: Any = view.module(path)
            delattr(module, name)
            module._is_hf_initialized = True  # transformers must not look for the removed parameter
        if view.experts_path(layer) is not None:
            with_experts.append(layer)
    make_adjustable(model, checkpoint, variants, with_experts)


def keep_as_stored(
    model: "PreTrainedModel", stored: Mapping[str, Tensor], dtype: torch.dtype, kernels: ProductKernels
) -> None:
    """Let the embedding and the head use the mapped tables of the files, instead of wider copies."""
    tables = _tables(model, stored)
    for name, module in tables.items():
        if isinstance(module, nn.Linear):
            model.set_output_embeddings(PackedLinear.of_kept(stored[name], module.bias, kernels))
    head = model.get_output_embeddings() if tables else None
    for name, module in tables.items():
        if isinstance(module, nn.Embedding):
            if type(head) is nn.Linear and head.weight is module.weight:
                model.set_output_embeddings(PackedLinear.of_kept(stored[name], head.bias, kernels))
            model.set_input_embeddings(KeptEmbedding(stored[name], module.padding_idx, dtype))


def _tables(model: "PreTrainedModel", stored: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Names of the embedding's and the head's own tables that are stored in bfloat16."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = task_of(model.config).ends(model)
    plain = {f"{names[id(end)]}.weight": end for end in ends if type(end) in (nn.Embedding, nn.Linear)}
    return {n: end for n, end in plain.items() if n in stored and stored[n].dtype == torch.bfloat16}


def choose_kernels(name: str, device: str | torch.device = "cpu") -> ProductKernels:
    """Kernels by name, with a warning if `auto` finds only the slow reference kernels."""
    device = torch.device(device)
    chosen = find_kernels(name, device)
    if name == "auto" and chosen.name == "reference":
        fast = "native" if device.type == "cpu" else "triton"
        reason = KERNELS[fast].unusable(device)
        warnings.warn(f"moqa uses its slow reference kernels, {fast} kernels are missing: {reason}", stacklevel=2)
    return chosen


def _check_units(view: ModelView, checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each unit of the model in the checkpoint: a model of text that was stored with towers has longer ones."""
    wanted = {name: (unit.shape, unit.layer) for name, unit in view.units.items()}
    stored = {name: (unit.shape, unit.layer) for name, unit in checkpoint.manifest.units.items()}
    shorter = wanted.keys() != stored.keys()
    ours = {_in_block(name, layer): name for name, (_, layer) in wanted.items()} if shorter else {}
    stored_as = {ours.get(_in_block(name, layer), name): name for name, (_, layer) in stored.items()}
    found = {name: stored[as_] for name, as_ in stored_as.items()}
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise MoqaError(
            f"{checkpoint.folder}: {name} is {_described(found, name)}", f"config.json needs {_described(wanted, name)}"
        )
    return stored_as


def _in_block(name: str, layer: int) -> str:
    """End of a unit's name, from the list of layers on."""
    _, there, end = name.partition(f"layers.{layer}.")
    return there + end or name


def _described(units: Mapping[str, tuple[tuple[int, int], int]], name: str) -> str:
    return f"{units[name][0]} in layer {units[name][1]}" if name in units else "no such unit"


def _check_kept(model: "PreTrainedModel", stored: Mapping[str, Tensor], folder: Path) -> None:
    wanted = model.state_dict()
    for name, tensor in stored.items():
        other = wanted.get(name)
        # a buffer that is created with the model may be stored too, in any floating-point dtype
        if other is not None and (
            other.shape != tensor.shape or other.is_floating_point() != tensor.is_floating_point()
        ):
            found, needed = (f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (tensor, other))
            raise MoqaError(f"{folder}: {name} is {found}", f"config.json needs {needed}")
