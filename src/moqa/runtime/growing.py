"""A key-value cache with spare capacity: a new token is written in place, without copying those before it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SMALLEST = 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers that double in size; `keys` and `values` are views of the filled part."""

    def __init__(self, **options: Any) -> None:
        self.length = 0
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
        for name, states in {"keys": key_states, "values": value_states}.items():
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
        return self._buffers[name][..., : self.length, :] if name in self._buffers else None

    def _replace(self, name: str, states: Tensor | None) -> None:
        if states is None:
            self._buffers.pop(name, None)
            return
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
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(layers)])

    def reserve(self, length: int) -> None:
        """Make room for this many tokens in every layer."""
        for layer in self.layers:
            layer.reserve(length)

    def advance(self, length: int) -> None:
        """Set the number of tokens that every layer holds, after a kernel has written them."""
        for layer in self.layers:
            layer.length = length
