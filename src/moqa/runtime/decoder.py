"""One token through the whole model in one native call, for decoders of the usual structure.

With a single token, the framework's overhead between the products takes longer than the products. Whether a model has
the usual structure is found from its parts and then by a trial: a decoder is used only if it agrees with transformers.
"""

import os
import threading
from typing import TYPE_CHECKING, Any, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moqa.kernels import PackedMatrix, Prepared, native
from moqa.runtime.growing import GrowingCache
from moqa.runtime.packed import PackedExperts, PackedLinear, activation_name
from moqa.runtime.routing import uncounted
from moqa.runtime.variants import Variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# families whose forward pass is compared in the tests; they compute nothing else between the parts
FAMILIES = ("llama", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend only on the position
TRIAL_TOKENS, TOLERANCE = 6, 0.03


# the decoder of each model, or that it has none, until one of its matrices moves: a decoder holds their addresses
_DECODERS: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()
_MAKING = threading.RLock()
os.register_at_fork(before=_MAKING.acquire, after_in_parent=_MAKING.release, after_in_child=lambda: _begin_anew())


def _begin_anew() -> None:
    """In a forked process, forget decoders that a thread of the parent was just using."""
    _DECODERS.clear()
    _MAKING.release()


class FusedDecoder:
    """A model that decodes one token per call.

    >>> decoder = FusedDecoder.of(model)
    >>> cache = decoder.cache()
    >>> logits = model(tokens[:1], past_key_values=cache, use_cache=True).logits
    >>> decoder.step(int(logits[0, -1].argmax()), cache).shape
    torch.Size([8192])
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._table: Any = model.get_input_embeddings()
        base: Any = model.base_model
        self._rotary = base.rotary_emb
        # native code holds addresses: the tensors that they point to are kept alive here
        self._alive: list[Any] = []
        self._in_use: dict[int, tuple[Any, Tensor | None]] = {}
        self._experts = [(i, layer.mlp.experts) for i, layer in enumerate(base.layers) if hasattr(layer.mlp, "experts")]
        self._variants: Variants = self._experts[0][1].moqa_weights.variants if self._experts else Variants()
        self._lock = threading.Lock()
        self._generation = -1  # of the variants whose experts native code has; it gets them at the first step
        layers = [native.layer(self._describe(layer)) for layer in base.layers]
        head: Any = model.get_output_embeddings()
        self._decoder = native.decoder(layers, self._float(base.norm.weight), _epsilon(base.norm), head.matrix)
        self._alive.append(head.matrix)
        self._depth = len(layers)
        self._vocabulary = head.matrix.shape[0]
        self._angles: tuple[Tensor, Tensor] | None = None
        self._past: tuple[tuple[int, ...], Any] = ((), None)

    @classmethod
    def of(cls, model: "PreTrainedModel") -> Optional["FusedDecoder"]:
        """The decoder of a model; None if its structure is not supported, or the two do not agree in a trial."""
        if hasattr(model, "peft_config"):  # it may adapt any part
            return None
        with _MAKING:
            return cls._of(model)

    @classmethod
    def _of(cls, model: "PreTrainedModel") -> Optional["FusedDecoder"]:
        known = _DECODERS.get(model)
        if known is None or known.ended:
            decoder = cls(model) if _is_supported(model) else None
            if decoder is not None:
                with uncounted(model):
                    decoder = decoder if decoder._agrees(model) else None
            matrices = [module for module in model.modules() if isinstance(module, PackedMatrix)]
            known = _DECODERS[model] = Prepared(decoder, matrices)
        made: FusedDecoder | None = known.made
        return made

    def cache(self) -> GrowingCache:
        """An empty cache that `step` can write to."""
        return GrowingCache(self._depth)

    @torch.inference_mode()
    def step(self, token: int, cache: GrowingCache) -> Tensor:
        """Process one token.

        Args:
            token: its id.
            cache: of all tokens before it, at least one; this token is appended.

        Returns:
            [vocabulary] logits of the next token, float32.
        """
        # one thread at a time: native code would compute with the experts that another has just replaced
        # the number is read first: if others switch meanwhile, the next step looks again
        with self._lock:
            generation = self._variants.generation
            with self._variants.pinned():
                if self._generation != generation:
                    self._follow_variants()
                    self._generation = generation
                return self._step(token, cache)

    def _step(self, token: int, cache: GrowingCache) -> Tensor:
        position = cache.get_seq_length()
        cache.reserve(position + 1)
        room = cache.layers[0].capacity
        if self._angles is None or len(self._angles[0]) < room:
            cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), torch.arange(room)[None])
            self._angles = cos[0].float().contiguous(), sin[0].float().contiguous()
        embedding = self._table(torch.tensor([token])).float()
        logits = torch.empty(self._vocabulary, dtype=torch.float32)
        past = self._addresses(cache, room)
        native.decode(self._decoder, past, embedding, position=position, angles=self._angles, logits=logits)
        cache.advance(position + 1)
        return logits

    def _follow_variants(self) -> None:
        """Use the experts of the current variant, and the counts that they are counted in."""
        for layer, experts in self._experts:
            packed: PackedExperts = experts.moqa_weights
            prepared = native.use_experts(self._decoder, layer, packed.stack(experts), packed.counts)
            self._in_use[layer] = prepared, packed.counts

    def _addresses(self, cache: GrowingCache, room: int) -> Any:
        places = tuple(address for layer in cache.layers for address in layer.addresses())
        if self._past[0] != (*places, room):
            self._past = (*places, room), native.past(list(places[::2]), list(places[1::2]), room, cache.rounded)
        return self._past[1]

    def _float(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        self._alive.append(tensor.detach().float().contiguous())
        return self._alive[-1]

    def _describe(self, layer: Any) -> dict[str, Any]:
        """The parts of a layer in the form that native code takes."""
        attention, mlp = layer.self_attn, layer.mlp
        parts: dict[str, Any] = {
            "epsilon": _epsilon(layer.input_layernorm), "scale": attention.scaling, "head_dim": attention.head_dim,
            "before_attention": self._float(layer.input_layernorm.weight),
            "before_mlp": self._float(layer.post_attention_layernorm.weight),
        }  # fmt: skip
        for name in "qkvo":
            linear = getattr(attention, f"{name}_proj")
            parts |= {name: linear.matrix, f"{name}_bias": self._float(linear.bias)}
        parts["heads"] = parts["q"].shape[0] // attention.head_dim
        parts["kv_heads"] = parts["k"].shape[0] // attention.head_dim
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            parts[name] = None if norm is None else self._float(norm.weight)
        parts["norm_heads"] = parts["q_norm"] is not None and len(parts["q_norm"]) == attention.head_dim
        dense = mlp
        if hasattr(mlp, "experts"):
            packed: PackedExperts = mlp.experts.moqa_weights
            parts |= {
                "router": self._float(mlp.gate.weight), "experts": packed.stack(mlp.experts),
                "experts_count": mlp.experts.num_experts, "top_k": mlp.gate.top_k,
                "normalize": int(getattr(mlp.gate, "norm_topk_prob", True)),
            }  # fmt: skip
            dense = getattr(mlp, "shared_expert", None)
            if dense is not None:
                parts["share"] = self._float(mlp.shared_expert_gate.weight)
        if dense is not None:
            parts |= {name: getattr(dense, f"{name}_proj").matrix for name in ("gate", "up", "down")}
            parts["activation"] = activation_name(dense.act_fn)
        self._alive.append(parts)
        return parts

    @torch.inference_mode()
    def _agrees(self, model: "PreTrainedModel") -> bool:
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
        ours, theirs = self.cache(), self.cache()
        model(ids[:, :3], past_key_values=ours, use_cache=True)
        expected = model(ids, past_key_values=theirs, use_cache=True).logits[0, 3:].float()
        logits = torch.stack([self.step(int(token), ours) for token in ids[0, 3:]])
        errors = (logits - expected).norm(dim=1) / (expected - expected.mean(1, keepdim=True)).norm(dim=1)
        # the median: a router with a near tie between experts may choose another one after any change of rounding
        return bool(errors.median() < TOLERANCE)


def _is_supported(model: "PreTrainedModel") -> bool:
    if not decodes_natively(model.config) or model.dtype != torch.float32 or model.device.type != "cpu":
        return False
    base: Any = model.base_model
    linears = [module for layer in base.layers for module in _linears(layer)]
    linears.append(model.get_output_embeddings())
    return all(isinstance(module, PackedLinear) and module.kernels.name == "native" for module in linears) and all(
        _experts_known(layer.mlp) for layer in base.layers
    )


def _linears(layer: Any) -> list[nn.Module]:
    attention = [getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"]
    dense = getattr(layer.mlp, "shared_expert", None) if hasattr(layer.mlp, "experts") else layer.mlp
    return attention + ([] if dense is None else [getattr(dense, f"{name}_proj") for name in ("gate", "up", "down")])


def _experts_known(mlp: Any) -> bool:
    dense = getattr(mlp, "shared_expert", None) if hasattr(mlp, "experts") else mlp
    if dense is not None and activation_name(dense.act_fn) is None:
        return False
    packed = getattr(getattr(mlp, "experts", None), "moqa_weights", None)
    return not hasattr(mlp, "experts") or (packed is not None and packed.activation is not None)


def decodes_natively(config: Any) -> bool:
    """Whether models with this configuration have the structure that `FusedDecoder` computes, and so its cache."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in FAMILIES and rope.get("rope_type", "default") in ROPES
        and kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        and getattr(config, "clip_qkv", None) is None
    )  # fmt: skip


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)
