"""A LoRA that PEFT saved, on a packed model.

Nothing in its folder chooses what is done: the configuration is read as data, and what moqa does not know is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moqa.errors import MoqaError, one_line
from moqa.runtime.packed import PackedConvolution, PackedLinear
from moqa.storage.files import check_file, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# what was true while it was trained, or says only what the names of the tensors say
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "peft_type", "peft_version", "revision", "target_modules",
    "task_type",
)  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal")  # others begin with changed weights of the model
_PREFIX = "base_model.model."
_EXPERTS = re.compile(r"(?<!\.moqa_weights)\.experts\.(?=\d+\.)")  # as the original's files name them
_NAME = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight")


def add_lora(model: "PreTrainedModel", folder: str | Path) -> None:
    """Let a packed model compute with a LoRA.

    >>> model, tokenizer = moqa.load("runs/out")
    >>> add_lora(model, "runs/lora")  # doctest: +SKIP

    Args:
        model: of `moqa.load`; the LoRA's layers take the place of its own.
        folder: that PEFT's `save_pretrained` wrote.

    Raises:
        MoqaError: if PEFT is missing, or the folder is not a LoRA of matrices of this model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise MoqaError("a LoRA needs `pip install 'moqa[peft]'`", f"{error.name} is missing") from None
    folder = Path(folder)
    given, tensors = _read(folder)
    modules = _check_fits(model, tensors, folder)
    _check_known(
        given, LoraConfig().to_dict(), max(len(tensor) for name, tensor in tensors.items() if "lora_A" in name)
    )
    used = {name: given[name] for name in _USED if given.get(name) is not None}
    config = LoraConfig(**used, target_modules=modules, inference_mode=True)
    places = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    try:
        inject_adapter_in_model(config, model, state_dict=places)
        set_peft_model_state_dict(model, tensors)
    except (ValueError, RuntimeError) as error:
        raise MoqaError(f"{folder} cannot be used", one_line(error)) from None
    model.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MoqaError(f"{folder} is not the folder of a LoRA", f"{name} is missing")
    try:
        check_file(folder / WEIGHTS)
        given, stored = read_object(folder / CONFIG), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise MoqaError(f"{folder} is not the folder of a LoRA", one_line(error)) from None
    if given.get("peft_type") != "LORA":
        raise MoqaError(f"{folder} is not the folder of a LoRA", f"peft_type in {CONFIG} is not LORA")
    return given, {_EXPERTS.sub(".experts.moqa_weights.experts.", name): tensor for name, tensor in stored.items()}


def _check_fits(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Names of the modules that it adapts."""
    modules, found = dict(model.named_modules()), set[str]()
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            raise MoqaError(f"{folder}/{WEIGHTS} has {name}", "known are lora_A and lora_B of matrices")
        found.add(match[1])
    if not found:
        raise MoqaError(f"{folder}/{WEIGHTS} is empty", "a LoRA has lora_A and lora_B of matrices")
    for path in sorted(found):
        module = modules.get(path)
        if not isinstance(module, PackedLinear) or isinstance(module, PackedConvolution):
            raise MoqaError(f"{folder} adapts {path}", "the model has no such matrix")
        first, second = (tensors.get(f"{_PREFIX}{path}.lora_{part}.weight", torch.empty(0)) for part in "AB")
        rank = len(first) if first.ndim else 0
        wanted = (rank, module.in_features), (module.out_features, rank)
        if (
            not rank
            or (first.shape, second.shape) != wanted
            or not (first.is_floating_point() and second.is_floating_point())
        ):
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise MoqaError(
                f"{folder}: lora_A and lora_B of {path} are {shapes}", f"the matrix is {module.matrix.shape}"
            )
    return sorted(found)


def _check_known(given: Mapping[str, Any], default: Mapping[str, Any], rank: int) -> None:
    """Refuse what a configuration asks for beyond a plain LoRA of at most this rank."""

    def is_known(name: str, value: Any) -> bool:
        match name:
            case "r":
                return type(value) is int and 0 < value <= rank
            case "lora_alpha":
                return type(value) in (int, float) and 0 < value < 1e6
            case "rank_pattern" | "alpha_pattern":
                kind, patterns = "r" if name == "rank_pattern" else "lora_alpha", value or {}
                return isinstance(patterns, dict) and all(
                    re.fullmatch(r"[\w.]+", key) and is_known(kind, one) for key, one in patterns.items()
                )
            case "use_rslora":
                return isinstance(value, bool)
            case "init_lora_weights":
                return value in _STARTS
        return name in _HARMLESS or value in (default.get(name), None, False, [], {})

    for name, value in given.items():
        if not is_known(name, value):
            raise MoqaError(f"{CONFIG} of the LoRA has {name[:80]!r}: {value!r:.80}", "moqa knows plain LoRA only")
