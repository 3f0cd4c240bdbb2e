"""Adapters for modules that compute experts or linear layers but do not expose them as such."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

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


def _adapt_attention(module: nn.MultiheadAttention) -> None:
    """PyTorch's own attention, which has the matrices of queries, keys and values in one parameter."""
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return  # three parameters, or keys that come from no input: not adapted, so refused where a unit is looked for
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(number * module.embed_dim, (number + 1) * module.embed_dim)
        module.add_module(name, LinearPart(module, rows, "in_proj_weight"))
    module._qkv_same_embed_dim = False  # or layers of PyTorch take the parameter past `forward`
    module.forward = partial(_run_attention, module)  # type: ignore[method-assign]


def _run_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001  # a promise about attn_mask
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What `nn.MultiheadAttention.forward` computes."""
    is_batch, first = query.dim() == 3, module.batch_first
    heads, size = module.num_heads, module.head_dim
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)

    def split(part: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """-> [batch, heads, length, size]."""
        out = part(x) if bias is None else part(x) + bias
        out = out[None] if not is_batch else out if first else out.transpose(0, 1)
        return out.unflatten(-1, (heads, size)).transpose(1, 2)

    parts = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (split(*each) for each in zip(parts, (query, key, value), biases, strict=True))
    scores = q @ k.mT * size**-0.5
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask.view(-1, 1, 1, k.shape[2])):
        if mask is not None:
            mask = mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = dropout(scores.softmax(-1), module.dropout, module.training)
    out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    out = out[0] if not is_batch else out if first else out.transpose(0, 1)
    shown = weights.mean(1) if average_attn_weights else weights
    return out, None if not need_weights else shown if is_batch else shown[0]


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Llama4TextMoe": _adapt_llama4,
    "DeepseekV4GroupedLinear": _adapt_groups,
    "JetMoeMoE": _adapt_jetmoe,
    "JetMoeMoA": _adapt_jetmoe_attention,
    "MultiheadAttention": _adapt_attention,
}
