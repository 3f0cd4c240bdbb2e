"""Random models in bfloat16, for measuring: a Qwen3 Mixture-of-Experts of 441 M parameters (8 layers, 32 experts of
which 4 work on a token, hidden size 1024, expert width 512), and one of OLMoE-1B-7B's shape with any number of layers.

    benchmarks/random_model.py FOLDER [olmoe LAYERS]
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

ROOT = Path(__file__).parents[1]
CONFIG = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
    vocab_size=8192,  # the tokenizer's; output weights take the same share of a token's bytes as in Qwen3-30B-A3B
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    intermediate_size=2048,  # of dense layers, which it has none of
    norm_topk_prob=True,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)


def olmoe(layers: int = 16) -> OlmoeConfig:
    """OLMoE-1B-7B's shape: 64 experts, top 8, hidden size 2048, expert width 1024, 14 GB with its 16 layers."""
    return OlmoeConfig(
        architectures=["OlmoeForCausalLM"], dtype="bfloat16", vocab_size=50304, hidden_size=2048,
        intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        num_experts=64, num_experts_per_tok=8, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def tensors(config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    """Names and weights of one shard after the other: what is outside the layers, then every layer."""
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)

    def norm(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(1, 0.1, generator=random)

    hidden, expert = config.hidden_size, getattr(config, "moe_intermediate_size", config.intermediate_size)
    # OLMoE normalises all heads together
    head = getattr(config, "head_dim", hidden // config.num_attention_heads)
    together = isinstance(config, OlmoeConfig)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield {
        "model.embed_tokens.weight": matrix(config.vocab_size, hidden),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": matrix(config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        shard = {
            "input_layernorm.weight": norm(hidden),
            "self_attn.q_proj.weight": matrix(queries, hidden),
            "self_attn.k_proj.weight": matrix(keys, hidden),
            "self_attn.v_proj.weight": matrix(keys, hidden),
            "self_attn.o_proj.weight": matrix(hidden, queries),
            "self_attn.q_norm.weight": norm(queries if together else head),
            "self_attn.k_norm.weight": norm(keys if together else head),
            "post_attention_layernorm.weight": norm(hidden),
            "mlp.gate.weight": matrix(config.num_experts, hidden),
        }
        for index in range(config.num_experts):
            shard[f"mlp.experts.{index}.gate_proj.weight"] = matrix(expert, hidden)
            shard[f"mlp.experts.{index}.up_proj.weight"] = matrix(expert, hidden)
            shard[f"mlp.experts.{index}.down_proj.weight"] = matrix(hidden, expert)
        yield {f"model.layers.{layer}.{name}": weight for name, weight in shard.items()}


def make(folder: Path, config: PreTrainedConfig = CONFIG) -> None:
    """Writes the model to the folder, unless it is there already."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = {}, 0
    for number, shard in enumerate(tensors(config), 1):
        file = f"model-{number:05}-of-{config.num_hidden_layers + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(shard, file)
        size += sum(weight.nbytes for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "reference" / "model" / name, folder)
    config.save_pretrained(folder)  # last, as the sign that all is there


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "random-model"
    make(target, olmoe(int(sys.argv[3])) if len(sys.argv) > 3 else CONFIG)
