"""A dry run: the size of a model's cache and buffers at any length, from its own forward on tensors without memory."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moqa.errors import MoqaError
from moqa.generation.loop import CHUNK
from moqa.models.experts import Experts, is_experts, weights_from

FIRST = 8  # tokens that are read to make a cache; it is then extended up to the last chunk without reading
LARGE = 32 * 2**20  # bytes from which glibc returns a freed block to the system at once


@dataclass(frozen=True)
class DryRun:
    """Memory in use while a model reads the last chunk of a prompt, in bytes.

    Attributes:
        cache: size of each tensor of the cache, after the chunk.
        small: largest total of other tensors below `LARGE`.
        large: largest total of other tensors of at least `LARGE`.
    """

    cache: tuple[int, ...]
    small: int
    large: int


def dry_run(model: nn.Module, context: int, cache: Any = None) -> DryRun:
    """Let a model read a prompt without computing anything.

    >>> sum(dry_run(view.model, 16).cache)  # 6 blocks, 16 tokens, 128 features of keys and of values in float32
    98304

    Args:
        model: a causal language model of transformers on fake tensors; call this within their mode.
        context: tokens of the prompt, one or more.
        cache: an empty cache to read with; None for the model's own.

    Raises:
        MoqaError: if the model has no cache of the usual kind.
    """
    chunk = min(context, CHUNK)
    first = min(context - chunk, FIRST)
    with torch.no_grad(), _without_experts(model), _Living(model) as living:
        if first:
            cache = _read(model, first, cache)
            for layer in cache.layers:
                _lengthen(layer, context - chunk - first)
        before, living.most = dict(living.now), dict(living.now)
        cache = _read(model, chunk, cache)
        # a tensor of the cache may be small before the chunk and large after it
        small, large = (living.most[kind] - max(before[kind], living.now[kind]) for kind in (False, True))
        return DryRun(tuple(living.sizes.values()), small, large)


def _read(model: Any, tokens: int, cache: Any) -> Any:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache = getattr(out, "past_key_values", None)
    if not hasattr(cache, "layers"):
        raise MoqaError(f"a {model.config.model_type} model has no cache of layers", "moqa cannot estimate its size")
    return cache


def _lengthen(layer: Any, tokens: int) -> None:
    """Extend a layer of a cache by tokens that were not read; states of constant size stay as they are."""
    from transformers.cache_utils import DynamicLayer

    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.update(*(_more(states, tokens, -2) for states in (layer.keys, layer.values)))
    if getattr(layer, "indexer_keys", None) is not None:
        layer.update_indexer(_more(layer.indexer_keys, tokens, 1))
    # one entry for every `compress_rate` tokens, and a buffer of the tokens that do not fill one yet
    for name, entries in getattr(layer, "compressed_kv", {}).items():
        full, rest = divmod(layer.buffer_kv[name].shape[1] + tokens, layer.compress_rate)
        layer.update_compressor_states(name, _more(entries, full, 1))
        for waiting in (layer.buffer_kv, layer.buffer_gate):
            waiting[name] = _more(waiting[name], rest, 1)


def _more(states: Tensor, tokens: int, dim: int) -> Tensor:
    shape = list(states.shape)
    shape[dim] = tokens
    return states.new_empty(shape)


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Skip the experts: the routing depends on values, and their memory is known without a dry run."""
    skipped: Any = _Skipped()  # never asked for products
    with ExitStack() as stack:
        for module in model.modules():
            if is_experts(module):
                stack.enter_context(weights_from(module, skipped))
        yield


class _Skipped:
    """`ExpertWeights` that compute nothing."""

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """See `ExpertWeights`."""
        return torch.empty_like(hidden)


class _Living(TorchDispatchMode):
    """Tracks the memory of all tensors, except those of a model.

    Attributes:
        sizes: identity of a storage -> its bytes.
        now: total bytes, by whether tensors are large.
        most: largest such total since it was set.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}
        self.now, self.most = {False: 0, True: 0}, {False: 0, True: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # there are no values; families ask for one to choose between tables of rotary angles
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._model and key not in self.sizes:
            self.sizes[key] = size
            self._add(size >= LARGE, size)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size = self.sizes.pop(key)
        self._add(size >= LARGE, -size)

    def _add(self, large: bool, size: int) -> None:
        self.now[large] += size
        self.most[large] = max(self.most[large], self.now[large])
