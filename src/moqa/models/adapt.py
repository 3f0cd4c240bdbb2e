"""Adapters for modules that compute experts or linear layers but do not expose them as such."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moqa.models.experts import run_experts
from moqa.models.parts import ExpertsOf, LinearPart, gated


def adapt(model: nn.Module) -> None:
    """Expose experts and linear layers that a family hides; parameters and outputs stay the same.

    >>> adapt(llama4)  # doctest: +SKIP
    >>> is_experts(llama4.model.layers[0].feed_forward.experts)  # doctest: +SKIP
    True
    """
    for module in list(model.modules()):
        adapter = _ADAPTERS.get(type(module).__name__)
        if adapter is not None and not getattr(module, "moqa_adapted", False):
            adapter(module)
            module.moqa_adapted = True  # type: ignore[assignment]


def _adapt_llama4(block: Any) -> None:
    experts = block.experts
    experts.is_transposed = experts.is_concatenated = experts.has_gate = True
    experts.has_bias = False
    experts._apply_gate = partial(gated, experts.act_fn)
    block.forward = partial(_run_llama4, block)


def _run_llama4(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What `Llama4TextMoe.forward` computes, without the products of experts that a token is not routed to.

    Llama 4 scales a token before its experts, not after: each (token, expert) pair is passed as a token with weight 1.
    """
    hidden = hidden.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    index = logits.topk(block.top_k, dim=1).indices
    visits = hidden[:, None] * scores.gather(1, index)[..., None]
    whole = visits.new_ones(index.numel(), 1)
    routed = run_experts(block.experts, visits.flatten(0, 1), index.reshape(-1, 1), whole)
    return block.shared_expert(hidden) + routed.view(visits.shape).sum(1), logits


def _adapt_jetmoe(block: Any) -> None:
    block.experts = ExpertsOf(block.input_linear, block.output_linear, block.activation)
    block.forward = partial(_run_jetmoe, block)


def _run_jetmoe(block: Any, x: Tensor) -> Tensor:
    """What `JetMoeMoE.forward` computes."""
    flat = x.flatten(0, -2)
    top, index = block.router(flat)[-1].topk(block.router.top_k, dim=1)
    return run_experts(block.experts, flat, index, top.softmax(1).type_as(x)).view(x.shape) + block.bias


def _adapt_jetmoe_attention(block: Any) -> None:
    """Attention in which every expert has its own query and output projections."""
    for module in (block.input_linear, block.output_linear):
        for expert in range(module.num_experts):
            module.add_module(str(expert), LinearPart(module, expert))
        module.forward = partial(_run_each, module)


def _run_each(module: nn.Module, x: Tensor, counts: list[int]) -> Tensor:
    """[tokens, in] in the order of the experts -> [tokens, out]."""
    # the last expert gets the rest: all tokens in a dry run, where the counts are unknown
    pairs = zip(module.children(), x.split([*counts[:-1], len(x) - sum(counts[:-1])]), strict=True)
    return torch.cat([expert(part) for expert, part in pairs if len(part)])


def _adapt_groups(module: Any) -> None:
    """Block-diagonal linear layer: each group of outputs multiplies only the inputs of its own group."""
    rows = module.out_features // module.n_groups
    for group in range(module.n_groups):
        module.add_module(str(group), LinearPart(module, slice(group * rows, (group + 1) * rows)))
    module.forward = partial(_run_groups, module)


def _run_groups(module: nn.Module, x: Tensor) -> Tensor:
    """[..., groups, in] -> [..., groups, out]."""
    return torch.stack([part(x[..., group, :]) for group, part in enumerate(module.children())], -2)


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Llama4TextMoe": _adapt_llama4,
    "DeepseekV4GroupedLinear": _adapt_groups,
    "JetMoeMoE": _adapt_jetmoe,
    "JetMoeMoA": _adapt_jetmoe_attention,
}
