"""`moqa.load`: a checkpoint as a transformers model whose weights stay packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moqa.errors import MoqaError
from moqa.format.reader import Checkpoint, open_checkpoint
from moqa.models.load import load_tokenizer
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.runtime.packed import PackedExperts, PackedLinear, PackedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(folder: str | Path, verify: bool = True) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a checkpoint.

    >>> model, tokenizer = moqa.load("runs/out")
    >>> model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8)

    Args:
        folder: of the checkpoint.
        verify: compare the files' hashes first.

    Returns:
        A transformers model in float32 whose units are packed, and its tokenizer.

    Raises:
        MoqaError: if the checkpoint is damaged or does not fit its own configuration.
    """
    checkpoint = open_checkpoint(folder, verify)
    return load_packed(checkpoint), load_tokenizer(checkpoint.folder)


def load_packed(checkpoint: Checkpoint) -> "PreTrainedModel":
    """The model of a checkpoint that has been checked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, OSError, KeyError) as error:
        raise MoqaError(f"{checkpoint.folder} has no usable config.json", str(error).splitlines()[0]) from None
    view = ModelView(model.eval())
    _check_units(view, checkpoint)
    for layer in range(len(view.layers)):
        tensors = checkpoint.layer(layer)
        matrices: dict[str, PackedMatrix] = {}
        for unit in view.layer_units(layer):
            scheme = checkpoint.manifest.units[unit.name].scheme
            stored = {suffix: tensors[f"{unit.name}.{suffix}"] for suffix in scheme.tensors(unit.shape)}
            matrices[unit.name] = PackedMatrix(scheme, unit.shape, stored)
        _install(view, view.layer_units(layer), matrices)
    kept = {n: t.float() if t.is_floating_point() else t for n, t in checkpoint.layer(None).items()}
    report = model.load_state_dict(kept, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if report.unexpected_keys or left:
        name = (report.unexpected_keys or left)[0]
        raise MoqaError(f"{checkpoint.folder}: {name} does not fit config.json", "one of the two was changed")
    return model.requires_grad_(False)


def _install(view: ModelView, units: list[Unit], matrices: dict[str, PackedMatrix]) -> None:
    stacks: dict[str, dict[tuple[int, str], PackedMatrix]] = {}
    for unit in units:
        if unit.expert is not None:
            stacks.setdefault(unit.module, {})[unit.expert, unit.projection] = matrices[unit.name]
            continue
        parent, _, child = unit.module.rpartition(".")
        linear = view.module(unit.module)
        assert isinstance(linear, nn.Linear)
        packed = PackedLinear(matrices[unit.name], linear.bias)
        setattr(view.module(parent), child, packed)
    for path, stacked in stacks.items():
        experts = view.module(path)
        experts.moqa_weights = PackedExperts(experts, stacked)
        del experts.gate_up_proj, experts.down_proj


def _check_units(view: ModelView, checkpoint: Checkpoint) -> None:
    wanted = {name: unit.shape for name, unit in view.units.items()}
    found = {name: unit.shape for name, unit in checkpoint.manifest.units.items()}
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise MoqaError(
            f"{checkpoint.folder}: {name} is {found.get(name, 'missing')}",
            f"config.json needs {wanted.get(name, 'no such unit')}",
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build a model without memory for its parameters; buffers are made for real, no checkpoint holds all of them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
