"""Families whose experts compute what transformers' experts interface describes, but do not stand behind it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moqa.models.experts import run_experts


def adapt(model: nn.Module) -> None:
    """Put such experts of a model behind the interface; their parameters and what comes out stay as they are.

    >>> adapt(model)
    >>> is_experts(model.model.layers[0].feed_forward.experts)
    True
    """
    for module in model.modules():
        if type(module).__name__ == "Llama4TextMoe":
            _adapt_llama4(module)


def _adapt_llama4(block: Any) -> None:
    experts = block.experts
    experts.is_transposed = experts.is_concatenated = experts.has_gate = True
    experts.has_bias = False
    experts._apply_gate = partial(_gated, experts.act_fn)
    block.forward = partial(_run_llama4, block)


def _gated(activation: nn.Module, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def _run_llama4(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What `Llama4TextMoe.forward` computes, without the products of experts that a token does not visit.

    Here a token is weighted before its experts see it, not after: every visit is a token of its own, with weight 1.
    """
    hidden = hidden.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    index = logits.topk(block.top_k, dim=1).indices
    visits = hidden[:, None] * scores.gather(1, index)[..., None]
    routed = run_experts(
        block.experts, visits.flatten(0, 1), index.reshape(-1, 1), torch.ones_like(visits[..., 0]).reshape(-1, 1)
    )
    return block.shared_expert(hidden) + routed.view(visits.shape).sum(1), logits
