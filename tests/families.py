"""Tiny random models of every family that the contract tests run over, saved as real checkpoints are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = Path(__file__).parents[1] / "reference" / "text"
VOCABULARY = 512
EXPERTS = 4
_SPREAD = 0.15


@dataclass(frozen=True)
class Family:
    """What a tiny model of a family is made of, and what a view must find in it."""

    config: dict
    moe_layers: int = 2
    roles: frozenset[str] = frozenset({"expert", "attention"})
    layers: int = 2
    router_spread: float = _SPREAD  # where experts are nearly even, any rounding turns one choice into another
    norm: float = 1.0  # mean of norms; some families add 1 themselves


_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_SHARED = frozenset({"expert", "attention", "shared"})
_DENSE_FIRST = _SHARED | {"mlp"}
_LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_SMALL = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}

FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family({**_SMALL, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2_moe": Family({**_SMALL, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40}, roles=_SHARED),
    "olmoe": Family({"num_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 96}),
    "mixtral": Family({**_LOCAL, "intermediate_size": 96}),
    "deepseek_v2": Family(
        {**_ROUTED, **_LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "greedy"},
        roles=_DENSE_FIRST, layers=3,
    ),
    "deepseek_v3": Family(
        {**_ROUTED, **_LATENT, "n_shared_experts": 2, "first_k_dense_replace": 1}, roles=_DENSE_FIRST, layers=3
    ),
    "granitemoe": Family({**_LOCAL, "intermediate_size": 48, "tie_word_embeddings": True}),
    "phimoe": Family({**_LOCAL, "intermediate_size": 32, "attention_bias": True, "lm_head_bias": True}),
    "ernie4_5_moe": Family(
        {
            "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
            "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16,
        },
        roles=_DENSE_FIRST, layers=3,
    ),
    "glm4_moe": Family(
        {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True},
        roles=_DENSE_FIRST, layers=3,
    ),
    "lfm2_moe": Family(
        {**_SMALL, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
        roles=frozenset({"expert", "attention", "mlp"}), layers=3,
    ),
    "gpt_oss": Family(
        {
            **_LOCAL, "intermediate_size": 48, "head_dim": 16, "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    ),
    "dots1": Family(
        {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "n_group": 1, "topk_group": 1},
        roles=_DENSE_FIRST, layers=3,
    ),
    "hunyuan_v1_moe": Family(
        {"num_experts": EXPERTS, "moe_topk": [2, 2], "intermediate_size": 48, "head_dim": 16}, roles=_SHARED
    ),
    "flex_olmo": Family({"num_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 48}),
    "jamba": Family(
        {
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 48, "attn_layer_period": 2,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
            "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
        moe_layers=1, roles=frozenset({"expert", "attention", "mlp"}),
    ),
    "exaone_moe": Family(
        {
            **_SMALL, "num_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "n_group": 1,
            "topk_group": 1,
        },
        roles=_DENSE_FIRST, layers=3,
    ),
    "granitemoehybrid": Family(
        {
            **_LOCAL, "intermediate_size": 48, "shared_intermediate_size": 40, "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
        },
        roles=_SHARED,
    ),
    "qwen3_next": Family(
        {
            **_SMALL, "shared_expert_intermediate_size": 40, "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        roles=_SHARED, router_spread=1.0, norm=0.0,
    ),
    "llama4_text": Family(
        {
            **_LOCAL, "intermediate_size": 48, "intermediate_size_mlp": 96, "head_dim": 16, "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0, 1],
        },
        roles=_DENSE_FIRST, layers=4,
    ),
    "deepseek_v32": Family(
        {
            **_ROUTED, **_LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1, "index_n_heads": 2,
            "index_head_dim": 16, "index_topk": 28,
        },
        roles=_DENSE_FIRST, layers=3,
    ),
    "deepseek_v4": Family(
        {
            **_ROUTED, "num_key_value_heads": 1, "head_dim": 32, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16,
            "index_n_heads": 2, "index_head_dim": 16, "index_topk": 2, "sliding_window": 8, "hc_mult": 3,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        },
        moe_layers=3, roles=_SHARED, layers=3,
    ),
    "mimo_v2_flash": Family(
        {**_ROUTED, "head_dim": 16}, roles=frozenset({"expert", "attention", "mlp"}), layers=3
    ),
    "qwen3_5_moe_text": Family(
        {
            **_SMALL, "shared_expert_intermediate_size": 40, "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        roles=_SHARED, router_spread=1.0, norm=0.0,
    ),
    "gemma4_text": Family(
        {
            "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 32, "intermediate_size": 96,
            "enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
            "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
        },
        roles=_SHARED,
    ),
    "jetmoe": Family({**_LOCAL, "intermediate_size": 48, "kv_channels": 16, "tie_word_embeddings": True}),
    "minimax_m2": Family({**_LOCAL, "intermediate_size": 32, "head_dim": 16}, router_spread=1.0),
    "llama": Family({"intermediate_size": 96}, moe_layers=0, roles=frozenset({"attention", "mlp"})),
    "qwen2": Family({"intermediate_size": 96}, moe_layers=0, roles=frozenset({"attention", "mlp"})),
    "qwen3": Family({"intermediate_size": 96, "head_dim": 16}, moe_layers=0, roles=frozenset({"attention", "mlp"})),
}  # fmt: skip


_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip
_SIGHT = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
# models of text with towers: the family of the text, its changes for a wrapper, and what else the wrapper has
WRAPPERS: dict[str, tuple[str, dict, dict]] = {
    "qwen3_5_moe": ("qwen3_5_moe_text", {}, {"vision_config": _VISION, **_SIGHT}),
    "qwen3_vl_moe": (
        "qwen3_moe",
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True
            }
        },
        {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}, **_SIGHT},
    ),
    "llama4": (
        "llama4_text",
        {},
        {
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
                "vision_output_dim": 64, "image_size": 28, "patch_size": 14, "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "image_token_id": 10, "boi_token_index": 11, "eoi_token_index": 12,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {},
        {
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 16, "intermediate_size": 32, "patch_size": 4,
            },
            "audio_config": None, "image_token_id": 10, "video_token_id": 11, "audio_token_id": 13,
            "boi_token_id": 12, "eoi_token_id": 14,
        },
    ),
}  # fmt: skip


def train_tokenizer(texts: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([path.read_text()[:20_000] for path in texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def random_model(name: str, **changes: object) -> PreTrainedModel:
    """A random model of a family, float32 with values that bfloat16 holds."""
    family = FAMILIES.get(name, Family({}))
    options = {**_COMMON, "num_hidden_layers": family.layers, **family.config, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options), dtype=torch.float32)
    return _filled(model, family)


def random_wrapper(name: str) -> PreTrainedModel:
    """A random model of text with its towers, as `random_model`."""
    text, changes, others = WRAPPERS[name]
    family = FAMILIES[text]
    options = {**_COMMON, "num_hidden_layers": family.layers, **family.config, **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, text_config=options, **others)
    return _filled(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), family)


def _filled(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(1)[:, : tensor.shape[1]])
            elif tensor.dim() > 1:
                tensor.normal_(std=family.router_spread if key.endswith("mlp.gate.weight") else _SPREAD)
            else:
                tensor.normal_(mean=family.norm if "norm" in key else 0.0, std=_SPREAD)
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a model as checkpoints on the Hub are written: bfloat16, transformers' names on disk, with a tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
