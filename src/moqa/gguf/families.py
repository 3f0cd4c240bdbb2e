"""Families of models that llama.cpp runs and moqa writes for it: their settings, and their names of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moqa.errors import MoqaError
from moqa.tasks.names import depth, experts_per_token

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs a family.

    Attributes:
        architecture: llama.cpp's name of it.
        needs: settings of `config.json` that its code takes for granted.
        shares_keys: whether several heads may share keys and values.
        rotates_pairs: whether its queries and keys rotate neighbours instead of halves: their rows have another order.
    """

    architecture: str
    needs: Mapping[str, Any] = field(default_factory=dict)
    rotates_pairs: bool = False
    shares_keys: bool = True

    def check(self, config: "PretrainedConfig") -> None:
        """Refuse settings that llama.cpp would compute with otherwise.

        Raises:
            MoqaError: naming the setting.
        """
        for name, value in {**self.needs, "hidden_act": "silu"}.items():
            if (found := getattr(config, name, value)) != value:
                raise MoqaError(f"llama.cpp runs no {config.model_type} with {name} {found}", f"it needs {value}")
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        if not self.shares_keys and keys != heads:
            raise MoqaError(f"llama.cpp runs no {config.model_type} with {keys} heads of keys", f"it needs {heads}")
        kind = config.rope_parameters["rope_type"]
        if kind != "default":
            raise MoqaError(f"rotary embeddings of kind {kind} cannot be exported", "default ones can")
        if getattr(config, "use_sliding_window", False):
            raise MoqaError(f"llama.cpp runs no {config.model_type} with use_sliding_window", "it needs full attention")

    def write_settings(self, writer: "GGUFWriter", config: "PretrainedConfig") -> None:
        """Add what llama.cpp has to know of the model.

        >>> from gguf import GGUFWriter
        >>> writer = GGUFWriter(None, "qwen3moe")
        >>> find_family(view.model.config).write_settings(writer, view.model.config)
        >>> writer.kv_data[0]["qwen3moe.expert_count"].value
        16
        """
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_block_count(depth(config))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if experts:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(experts_per_token(config))
            if inner := getattr(config, "moe_intermediate_size", None):
                writer.add_expert_feed_forward_length(inner)
            if shared := getattr(config, "shared_expert_intermediate_size", None):
                writer.add_expert_shared_feed_forward_length(shared)

    def name(self, ours: str, layers: int) -> str:
        """llama.cpp's name of a tensor; the matrices of all experts are one tensor there.

        >>> find_family(view.model.config).name("model.layers.0.mlp.experts.3.up_proj.weight", 6)
        'blk.0.ffn_up_exps.weight'

        Args:
            ours: with its suffix, as in the model's state.
            layers: of the model.

        Raises:
            MoqaError: if it has none.
        """
        parts = ours.split(".")
        if self.expert(ours) is not None:
            del parts[parts.index("experts") + 1]
        found = _names(self.architecture, layers).get_name(".".join(parts), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise MoqaError(f"llama.cpp has no place for {ours} in its {self.architecture}", "it runs other models")
        return str(found)

    def expert(self, ours: str) -> int | None:
        """Which of a layer's experts a tensor belongs to; None if to none.

        >>> find_family(view.model.config).expert("model.layers.0.mlp.experts.3.up_proj.weight")
        3
        """
        _, _, after = ours.partition(".experts.")
        number = after.split(".")[0]
        return int(number) if number.isdigit() else None

    def ordered(self, name: str, rows: Tensor, config: "PretrainedConfig") -> Tensor:
        """Rows of a tensor in llama.cpp's order.

        Args:
            name: llama.cpp's.
            rows: [out, ...].
            config: of the model.
        """
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        role = name.split(".")[-2]
        if not self.rotates_pairs or role not in heads:
            return rows
        return rows.unflatten(0, (heads[role], 2, -1)).transpose(1, 2).flatten(0, 2)


# `model_type` of config.json -> what llama.cpp needs to know
FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family("qwen3moe", {"norm_topk_prob": True, "attention_bias": False}),
    "qwen2_moe": Family("qwen2moe", {"norm_topk_prob": False}),
    "olmoe": Family("olmoe", {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False}, shares_keys=False),
    "mixtral": Family("llama", rotates_pairs=True),
    "llama": Family("llama", {"attention_bias": False, "mlp_bias": False}, rotates_pairs=True),
    "qwen3": Family("qwen3", {"attention_bias": False}),
    "qwen2": Family("qwen2"),
}


def find_family(config: "PretrainedConfig") -> Family:
    """The family of a model.

    >>> find_family(view.model.config).architecture
    'qwen3moe'

    Raises:
        MoqaError: if moqa writes no files for it, or its settings are none of llama.cpp's.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise MoqaError(f"{config.model_type} cannot be exported for llama.cpp", f"there are {', '.join(FAMILIES)}")
    family.check(config)
    return family


def is_full(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in 32 bits: norms, biases, and what routes.

    >>> is_full("blk.0.ffn_gate_inp.weight", (16, 256)), is_full("token_embd.weight", (8192, 256))
    (True, False)
    """
    return len(shape) == 1 or ".ffn_gate_inp" in name


def _names(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kinds: dict[str, MODEL_ARCH] = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(kinds[architecture], layers)
