"""`config.json` as transformers' configuration: what it says of the model, but nothing that chooses code."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError, one_line
from moqa.storage.files import read_object, values_in
from moqa.tasks.names import EXPERTS_PER_TOKEN

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"
# which code computes, what it returns and from which files it reads is for whoever runs a model to choose
_OURS = re.compile(
    r"auto_map|_?(attn|experts)_implementation(_internal)?|use_kernels|kernel_config|"
    r"(use_)?return_dict|torchscript|output_(attentions|hidden_states|router_logits)"
)
# most that any key of a kind may say, several times what the largest models have: building takes as long
_COUNTS = {
    re.compile(r"(^|_)(layers?|blocks|depths?|stages)$"): 2**10,
    re.compile(r"experts$"): 2**14,
    re.compile(r"num_labels$"): 2**20,
    re.compile(r"position"): 2**27,
    re.compile(r"image_size$"): 2**12,
    re.compile(r""): 2**40,
}
_MOST_STACKED = 2**17  # experts of all layers
_THERE = re.compile(r"(num_|n_|moe_num_|num_local_|n_routed_)experts")


def read_configuration(folder: Path) -> "PretrainedConfig":
    """Configuration of a model folder, with attention and kernels left to us.

    >>> read_configuration(Path("reference/model")).num_experts
    16

    Raises:
        MoqaError: if transformers cannot read it, needs code of the folder for it, or would need far more memory or
            time than any model.
    """
    try:
        data = _without_code(read_object(Path(folder) / CONFIG))
        _check_counts(data)
        config = _as_transformers(data)
        _check_experts(config)
    except Exception as error:  # transformers raises many kinds of errors for what it does not expect
        raise MoqaError(f"{folder} has a config.json that transformers cannot read", one_line(error)) from None
    config.name_or_path = str(folder)
    return config


def _as_transformers(data: dict[str, Any]) -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING, AutoConfig

    from moqa.policies.lerobot_model import lerobot_config
    from moqa.policies.small import MODEL_TYPE, SmallPolicyConfig

    of_lerobot = lerobot_config(data)
    if of_lerobot is not None:
        return of_lerobot
    AutoConfig.register(MODEL_TYPE, SmallPolicyConfig, exist_ok=True)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise MoqaError(
            f"model_type {kind} is none that this transformers knows",
            "moqa does not run custom code of a folder: give a model of a known family, or upgrade transformers",
        )
    # from a folder of its own, so that transformers sees nothing else, and asks nobody whether to run it
    with TemporaryDirectory(prefix="moqa-config-") as clean:
        (Path(clean) / CONFIG).write_text(json.dumps(data), encoding="utf-8")
        return AutoConfig.from_pretrained(clean, trust_remote_code=False)


def _without_code(data: Any) -> Any:
    if isinstance(data, list):
        return [_without_code(value) for value in data]
    if isinstance(data, dict):
        return {key: _without_code(value) for key, value in data.items() if not _OURS.fullmatch(key)}
    return data


def _check_counts(data: dict[str, Any]) -> None:
    names = data.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MoqaError(f"architectures is {names}", "it must be a list of names")
    for key, value, _ in values_in(data):
        if isinstance(value, int):
            most = next(most for kind, most in _COUNTS.items() if kind.search(key))
            if abs(value) > most:
                raise MoqaError(f"{key} is {value}", f"moqa builds models with up to {most}")


def _check_experts(config: "PretrainedConfig") -> None:
    text = config.get_text_config()
    said = {key: value for key, value in vars(text).items() if type(value) is int}
    layers = said.get("num_hidden_layers", 1)
    for key, count in said.items():
        if not count or not _THERE.fullmatch(key):
            continue
        for name, chosen in said.items():
            if name in EXPERTS_PER_TOKEN and not 1 <= chosen <= count:
                raise MoqaError(f"{name} is {chosen}", f"a token can go to 1 to {count} experts ({key})")
        if count * layers > _MOST_STACKED:
            raise MoqaError(f"{layers} layers have {count} experts each", f"moqa builds up to {_MOST_STACKED} in all")
