"""What families of language models call the same thing: in `config.json`, and in the names of tensors."""

import re
from typing import TYPE_CHECKING, Any

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers translates some of these itself, e.g. `num_nextn_predict_layers`, but not in all families
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_tok", "experts_per_token", "top_k_experts", "moe_topk",
    "moe_top_k", "moe_k", "moe_router_topk",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
# experts of a block are chosen within groups of them
_GROUPS = ("n_group", "num_expert_group", "topk_group")
_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
_MTP = re.compile(r"(^|[._])mtp[._]")


def depth(config: "PretrainedConfig") -> int:
    """Number of decoder layers.

    >>> depth(view.model.config)
    6
    """
    return int(config.get_text_config().num_hidden_layers)


def experts_per_token(config: "PretrainedConfig") -> int:
    """How many routed experts a token is sent to; where layers differ, the most.

    >>> experts_per_token(view.model.config)
    2

    Raises:
        MoqaError: if no known name is in the configuration.
    """
    found = _first(config, EXPERTS_PER_TOKEN)
    if not found:
        raise MoqaError(
            f"{config.model_type} does not say how many experts a token is sent to",
            f"looked for {', '.join(EXPERTS_PER_TOKEN)}",
        )
    # some families give one number per layer
    return max(found) if isinstance(found, list | tuple) else int(found)


def with_experts(data: Any, before: int, after: int) -> Any:
    """What a `config.json` holds, with another number of routed experts.

    >>> with_experts({"text_config": {"num_experts": 16}}, 16, 8)
    {'text_config': {'num_experts': 8}}
    """
    if not isinstance(data, dict):
        return data
    return {
        key: after if key in _EXPERTS and value == before else with_experts(value, before, after)
        for key, value in data.items()
    }


def routes_in_groups(config: "PretrainedConfig") -> bool:
    """Whether a token first chooses groups of experts, whose sizes are equal.

    >>> routes_in_groups(view.model.config)
    False
    """
    text = config.get_text_config()
    return any((getattr(text, name, None) or 1) > 1 for name in _GROUPS)


def residual_streams(config: "PretrainedConfig") -> int:
    """How many hidden states of a token go from layer to layer.

    >>> residual_streams(view.model.config)
    1
    """
    return int(_first(config, ("hc_mult",)) or 1)


def shared_caches(config: "PretrainedConfig") -> int:
    """How many layers use the keys and values of earlier layers.

    >>> shared_caches(view.model.config)
    0
    """
    return int(_first(config, ("num_kv_shared_layers",)) or 0)


def is_mtp(config: "PretrainedConfig", name: str) -> bool:
    """Whether a tensor belongs to multi-token prediction: layers named so, or as many after the last as are declared.

    >>> is_mtp(view.model.config, "mtp.fc.weight"), is_mtp(view.model.config, "model.layers.5.mlp.gate.weight")
    (True, False)
    """
    after = int(_first(config, _MTP_LAYERS) or 0)
    layer = re.search(r"(^|\.)layers\.(\d+)\.", name)
    beyond = layer is not None and 0 <= int(layer[2]) - depth(config) < after
    return beyond or _MTP.search(name) is not None


def _first(config: "PretrainedConfig", names: tuple[str, ...]) -> Any:
    text = config.get_text_config()
    return next((value for name in names if (value := getattr(text, name, None))), None)
