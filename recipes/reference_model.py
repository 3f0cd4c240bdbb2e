"""The reference model's architecture, its fast experts on a CPU, and its losses."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

CHUNK = 1_024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Recipe:
    """What decides the result; the defaults are the reference model's."""

    steps: int | None = None  # None: train for `minutes`
    minutes: float = 80.0
    seed: int = 0
    batch_tokens: int = 4_096
    contexts: tuple[int, int] = (256, 512)  # the second for the last fifth
    vocab_size: int = 8_192
    peak_rate: float = 2.5e-3
    warmup_steps: int = 60
    hidden_size: int = 256
    layers: int = 6
    experts: int = 16
    expert_size: int = 256


def model_config(recipe: Recipe) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        num_experts=recipe.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=recipe.expert_size,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )


def sorted_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each expert in one product over its own tokens.

    The weights are taken apart by `unbind`: indexing one expert out of the 3-D parameter costs a zero-filled gradient
    of the whole parameter for every expert.
    """
    tokens, top_k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=experts.num_experts).tolist()
    inputs = hidden.index_select(0, order // top_k).split(counts)
    weights = zip(experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    outputs = [
        functional.linear(experts._apply_gate(functional.linear(rows, gate_up)), down)
        for rows, (gate_up, down) in zip(inputs, weights, strict=True)
    ]
    restored = torch.cat(outputs).index_select(0, order.argsort()).view(tokens, top_k, -1)
    return (restored * top_k_weights[..., None]).sum(dim=1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


def router_loss(logits: Tensor, top_k: int) -> Tensor:
    """Load-balance loss (1 when even) x 0.01 and z-loss x 1e-4 of one layer's [tokens, experts] router logits."""
    experts = logits.shape[-1]
    probabilities = logits.float().softmax(dim=-1)
    routed = probabilities.topk(top_k, dim=-1).indices.flatten().bincount(minlength=experts)
    balance = experts * (routed / routed.sum() * probabilities.mean(dim=0)).sum()
    return 0.01 * balance + 1e-4 * logits.float().logsumexp(dim=-1).square().mean()


def backward(model: nn.Module, tokens: Tensor) -> float:
    """Add one batch's gradients and return its cross-entropy per token."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.model(input_ids=inputs, use_cache=False, output_router_logits=True)
        router = sum(router_loss(logits, model.config.num_experts_per_tok) for logits in outputs.router_logits)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    # The head's backward runs chunk by chunk into a leaf, so that the logits of the whole batch never exist at once.
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for rows, wanted in zip(leaf.split(CHUNK), targets.split(CHUNK), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.lm_head(rows)
        loss = functional.cross_entropy(logits.float(), wanted, reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    torch.autograd.backward([hidden, router], [leaf.grad, None])
    return total


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tensor, bytes_of: Tensor, context: int) -> float:
    """Held-out bits per byte of a text, over windows of `context` that do not overlap.

    Args:
        model: in fp32 and eval mode.
        tokens: [tokens] of the text, int64.
        bytes_of: [vocabulary] bytes that each token stands for.
        context: tokens that are scored together.
    """
    bits, size = 0.0, 0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        bits += functional.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
        size += int(bytes_of[window[1:]].sum())
    return bits / size
