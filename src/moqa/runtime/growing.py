"""A key-value cache with spare capacity: a new token is written in place, without copying those before it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 256
_BITS = 8
_STEP = 4  # bytes of the value of one step, a float


def to_bytes(states: Tensor) -> Tensor:
    """Round states to bytes: whole steps from -127 to 127, the value of a step behind them.

    >>> to_bytes(torch.tensor([[2.0, -1.0, 0.0, 0.0]]))[0, :4]
    tensor([127, -64,   0,   0], dtype=torch.int8)

    Args:
        states: [..., features].

    Returns:
        [..., features + 4] int8.
    """
    step = states.float().abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, states.float() / step, 0.0).round()
    return torch.cat([rounded.to(torch.int8), step.contiguous().view(torch.int8)], -1)


def from_bytes(stored: Tensor) -> Tensor:
    """States that were rounded, [..., features] float32: the inverse of `to_bytes`.

    >>> from_bytes(to_bytes(torch.tensor([[127.0, -64.0, 0.0, 3.0]])))
    tensor([[127., -64.,   0.,   3.]])
    """
    return stored[..., :-_STEP].float() * stored[..., -_STEP:].contiguous().view(torch.float32)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers that double in size; `keys` and `values` are those of the filled part.

    Args:
        rounded: whether they are rounded to 8 bits.
        options: of `DynamicLayer`.
    """

    def __init__(self, rounded: bool = False, **options: Any) -> None:
        self.length, self.rounded = 0, rounded
        self._buffers: dict[str, Tensor] = {}
        super().__init__(**options)

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self._buffers["keys"].shape[-2] if self._buffers else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """See `DynamicLayer`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        for name, given in {"keys": key_states, "values": value_states}.items():
            states = to_bytes(given) if self.rounded else given
            if name not in self._buffers:
                self._buffers[name] = states.new_empty(*states.shape[:-2], 0, states.shape[-1])
            self._grow(name, end)
            self._buffers[name][..., self.length : end, :] = states
        self.length = end
        return self.keys, self.values

    def reserve(self, length: int) -> None:
        """Make room for this many tokens."""
        for name in self._buffers:
            self._grow(name, length)

    def addresses(self) -> tuple[int, int]:
        """Addresses of the buffers of keys and values."""
        return self._buffers["keys"].data_ptr(), self._buffers["values"].data_ptr()

    def get_seq_length(self) -> int:
        """See `DynamicLayer`."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """See `DynamicLayer`; the number is negative."""
        self.length -= min(abs(tokens_to_remove), self.length)

    def reset(self) -> None:
        """See `DynamicLayer`."""
        self.length, self.is_initialized = 0, False
        self._buffers.clear()

    def _grow(self, name: str, length: int) -> None:
        old = self._buffers[name]
        if old.shape[-2] >= length:
            return
        room = max(SMALLEST, 1 << (length - 1).bit_length())
        new = old.new_empty(*old.shape[:-2], room, old.shape[-1])
        new[..., : self.length, :] = old[..., : self.length, :]
        self._buffers[name] = new

    def _filled(self, name: str) -> Tensor | None:
        if name not in self._buffers:
            return None
        filled = self._buffers[name][..., : self.length, :]
        return from_bytes(filled).to(self.dtype) if self.rounded else filled

    def _replace(self, name: str, given: Tensor | None) -> None:
        if given is None:
            self._buffers.pop(name, None)
            return
        states = to_bytes(given) if self.rounded else given
        old = self._buffers.get(name)
        self.length = states.shape[-2]
        if old is None or old.data_ptr() != states.data_ptr() or old.shape[:-2] != states.shape[:-2]:
            self._buffers[name] = states.contiguous()

    # transformers reads and sets them, to reorder and repeat along the batch
    keys = property(lambda self: self._filled("keys"), lambda self, states: self._replace("keys", states))
    values = property(lambda self: self._filled("values"), lambda self, states: self._replace("values", states))


class GrowingCache(Cache):  # type: ignore[misc]
    """A cache of `GrowingLayer`s, for models whose layers all use full attention.

    >>> cache = GrowingCache(layers=model.config.num_hidden_layers)
    >>> output = model(tokens, past_key_values=cache, use_cache=True)
    >>> cache.get_seq_length()
    16

    Args:
        layers: number of layers.
        rounded: whether keys and values are rounded to 8 bits.
    """

    def __init__(self, layers: int, rounded: bool = False) -> None:
        super().__init__(layers=[GrowingLayer(rounded) for _ in range(layers)])
        self.rounded = rounded

    def reserve(self, length: int) -> None:
        """Make room for this many tokens in every layer."""
        for layer in self.layers:
            layer.reserve(length)

    def advance(self, length: int) -> None:
        """Set the number of tokens that every layer holds, after a kernel has written them."""
        for layer in self.layers:
            layer.length = length


def check_cache(model: "PreTrainedModel", kv_bits: int) -> None:
    """Refuse bits that keys and values of a model cannot have.

    >>> check_cache(model, 4)
    Traceback (most recent call last):
    moqa.errors.MoqaError: keys and values of 4 bits are not supported: give 8, or nothing

    Raises:
        MoqaError: if it has other layers than those of full attention, or the bits are not 8.
    """
    if kv_bits != _BITS:
        raise MoqaError(f"keys and values of {kv_bits} bits are not supported", f"give {_BITS}, or nothing")
    kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers} or {DynamicLayer}
    if kinds != {DynamicLayer}:
        name = min(kind.__name__ for kind in kinds - {DynamicLayer})
        raise MoqaError(
            f"a {model.config.model_type} model has a {name}, which cannot be rounded", "leave out --kv-bits"
        )


def round_cache(model: "PreTrainedModel", kv_bits: int | None) -> None:
    """Let the texts of a model have key-value caches of 8 bits.

    >>> round_cache(model, 8)
    >>> cache_for(model).rounded
    True

    Args:
        model: whose layers all use full attention.
        kv_bits: 8; None leaves keys and values as they are computed.

    Raises:
        MoqaError: see `check_cache`.
    """
    if kv_bits is None:
        return
    check_cache(model, kv_bits)
    model.moqa_rounds_cache = True


def cache_for(model: "PreTrainedModel") -> GrowingCache | None:
    """An empty cache for a model that `round_cache` was called with; None for others."""
    if not getattr(model, "moqa_rounds_cache", False):
        return None
    return GrowingCache(model.config.get_text_config().num_hidden_layers, rounded=True)
