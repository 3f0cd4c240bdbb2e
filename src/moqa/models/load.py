"""Open a model folder; refuse what transformers would silently fill with random numbers."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moqa.errors import MoqaError, one_line
from moqa.models.building import BUILDING, quiet
from moqa.originals import OriginalReader, find_format
from moqa.tasks import check_language_model, task_of
from moqa.tasks.configuration import read_configuration
from moqa.tasks.names import is_mtp

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_original(folder: Path, dtype: torch.dtype, stored: OriginalReader | None = None) -> "PreTrainedModel":
    """Original model of a folder as transformers itself loads and runs it, to compare moqa with.

    Args:
        folder: of the model.
        dtype: to compute in.
        stored: reader of the folder, for one that another tool has quantized; None for an original.

    Raises:
        MoqaError: if it is not a causal language model, is quantized in a format that moqa does not read, or its
            tensors are not those of its architecture.
    """
    from huggingface_hub.errors import StrictDataclassError

    config = read_config(folder, imported=stored is not None)
    stored = stored or OriginalReader(folder)
    auto = check_language_model(config, folder).auto_class(config)
    wrong = (ValueError, OSError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, StrictDataclassError)
    try:
        with BUILDING, quiet():
            options = {"config": config, "dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
            if stored.is_plain:
                model, report = auto.from_pretrained(folder, **options)
            else:
                with stored.opened() as on_disk:
                    state = {name: on_disk(name) for name in stored.headers}
                    family = auto._model_mapping[type(config)]
                    if not isinstance(config, family.config_class):  # what the auto class does for a part of a model
                        options["config"] = config.get_text_config()
                    model, report = family.from_pretrained(None, state_dict=state, **options)
                read_generation_config(model, folder)
    except wrong as error:
        problem = difference(folder, config) or one_line(error)
        raise MoqaError(f"{folder} cannot be loaded as {config.model_type}", problem) from None
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not is_mtp(config, key)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(str(key) for key in report[kind])[0]
            problem = difference(folder, config) or f"{len(report[kind])} {kind.replace('_', ' ')}, e.g. {name}"
            raise MoqaError(f"{folder} is not what its config.json says", problem)
    return model.eval().requires_grad_(False)


def read_config(folder: Path, packed: bool = False, imported: bool = False) -> "PretrainedConfig":
    """Configuration of a model folder that moqa can work on.

    Args:
        folder: of the model.
        packed: whether it is one of moqa's own checkpoints.
        imported: whether models that another tool has quantized are read, too.

    Raises:
        MoqaError: if transformers cannot read it, it belongs to no task of `moqa.tasks`, or it is quantized in a format
            that moqa does not read.
    """
    with quiet():
        config = read_configuration(folder)
    task_of(config, folder)
    named = None if packed else getattr(config, "transformers_weights", None)
    if named is not None:  # transformers would read this file instead
        raise MoqaError(f"{folder} names its weights {named} (transformers_weights in config.json)", "rename the files")
    quantized = None if packed else getattr(config, "quantization_config", None)
    if quantized:
        find_format(folder, quantized if isinstance(quantized, dict) else quantized.to_dict(), imported)
        # the reader returns plain weights
        del config.quantization_config
    return config


def read_generation_config(model: "PreTrainedModel", folder: Path) -> None:
    """Give a model that was built from config.json the folder's generation settings.

    They hold, for example, the additional end tokens of chat models.

    Raises:
        MoqaError: if the file is unusable.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds of errors for a configuration that it does not expect
        raise MoqaError(f"{folder} has no usable generation_config.json", one_line(error)) from None


def stored_shapes(config: "PretrainedConfig") -> dict[str, list[int]]:
    """Names and shapes of the tensors that a model of this configuration has on disk, without tied ones.

    >>> stored_shapes(view.model.config)["model.layers.0.mlp.experts.3.up_proj.weight"]
    [256, 256]
    """
    return _stored_shapes(_meta_model(config))


def _meta_model(config: "PretrainedConfig") -> "PreTrainedModel":
    with BUILDING, quiet(), torch.device("meta"):
        return task_of(config).auto_class(config).from_config(config)


def _stored_shapes(model: "PreTrainedModel") -> dict[str, list[int]]:
    from transformers.core_model_loading import revert_weight_conversion

    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    return {name: list(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def difference(folder: Path, config: "PretrainedConfig") -> str | None:
    """First difference between a folder's tensors and those of its architecture, with names as on disk."""
    try:
        model = _meta_model(config)
    except Exception:  # whatever is wrong with the configuration, the caller already has an error to report
        return None
    ties = model.all_tied_weights_keys
    wanted = _stored_shapes(model)
    found = {name: list(entry["shape"]) for name, entry in OriginalReader(folder, imported=True).headers.items()}
    tied = {source for target, source in ties.items() if target in found}
    missing = sorted(wanted.keys() - found.keys() - tied)
    extra = sorted(name for name in found.keys() - wanted.keys() - ties.keys() if not is_mtp(config, name))
    other = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    if missing:
        return f"it lacks {missing[0]} {wanted[missing[0]]}{_more(missing)}"
    if other:
        return f"{other[0]} is {found[other[0]]}, should be {wanted[other[0]]}{_more(other)}"
    return f"{config.model_type} has no {extra[0]} {found[extra[0]]}{_more(extra)}" if extra else None


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more like it" if len(names) > 1 else ""
