"""Run a model one decoder layer at a time, through its own forward, whatever family it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order.

    Raises:
        MoqaError: if they cannot be found; says where they were looked for.
    """
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else model
    for owner in (decoder, getattr(decoder, "model", None)):
        layers = getattr(owner, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    children = ", ".join(name for name, _ in decoder.named_children())
    raise MoqaError(f"{type(model).__name__} has no decoder layers", f"looked for `layers` among {children}")


# stands for a batch's token ids among what a layer is called with
_TOKENS = object()
# tokens that go through a layer together
BATCH_TOKENS = 1024


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """[windows, context] tokens in batches of about BATCH_TOKENS tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


class LayerwiseModel:
    """The three stages of a forward pass: embed, each layer, head.

    >>> stages = LayerwiseModel(model)
    >>> hidden = stages.embed(tokens)
    >>> for index in range(stages.depth):
    ...     hidden = stages.layer(index, hidden)
    >>> torch.equal(stages.head(hidden), model(tokens).logits)
    True

    The model's own forward runs with every layer's forward replaced, so whatever a family does before, between and
    after its layers (scaled embeddings, masks by layer type, capped logits) happens here too. All windows of a batch
    are full: no padding. What flows between layers is all that they read of a batch: of several residual streams the
    features of all, and where layers look at token ids (experts chosen by a table), those as a last feature.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.depth = len(self.layers)
        self._calls: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}
        self._outputs = 0  # how many a layer returns as a tuple
        self._streams, self._reads_tokens = torch.Size(), False
        probe = torch.zeros(1, 2, dtype=torch.long)
        try:
            with torch.no_grad(), self._replaced(partial(self._probe, probe)):
                model(probe, use_cache=False)
        except ValueError as error:
            problem = f"{type(model).__name__} cannot be run one layer at a time"
            reason = "its layers pass on more than hidden states: " if self._outputs > 1 else ""
            raise MoqaError(problem, f"{reason}{error}") from None

    def embed(self, tokens: Tensor) -> Tensor:
        """[batch, context] token ids -> [batch, context, features] input of layer 0."""
        first: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def record(_: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            calls.append((args, {k: _TOKENS if v is tokens else v for k, v in kwargs.items()}))
            return hidden

        with torch.no_grad(), self._replaced(record), self._short_head():
            self.model(tokens, use_cache=False)
        self._calls[tokens.shape[0], tokens.shape[1]] = calls
        return self._joined(first[0], tokens)

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """Output of decoder layer `index` for [batch, context, features] inputs; gradients flow if asked for."""
        args, kwargs = self._calls[hidden.shape[0], hidden.shape[1]][index]
        states, tokens = self._parted(hidden)
        out = self.layers[index](states, *args, **{k: tokens if v is _TOKENS else v for k, v in kwargs.items()})
        return self._joined(out[0] if isinstance(out, tuple) else out, tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """[batch, context, vocabulary] logits from the last layer's output."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        states, _ = self._parted(hidden)
        with self._replaced(lambda *_, **__: states):
            return self.model(tokens, use_cache=False).logits

    def _joined(self, states: Tensor, tokens: Tensor | None) -> Tensor:
        """What flows from one layer to the next as [batch, context, features]."""
        flat = states.flatten(2)
        # float32 holds the ids of any vocabulary
        return torch.cat([flat, tokens[..., None].float()], -1) if self._reads_tokens and tokens is not None else flat

    def _parted(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a layer is called with, and the token ids if it reads them."""
        tokens = None
        if self._reads_tokens:
            hidden, tokens = hidden[..., :-1].to(self.model.dtype), hidden[..., -1].long()
        return hidden.unflatten(2, self._streams) if len(self._streams) > 1 else hidden, tokens

    def _probe(self, tokens: Tensor, index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # only the first layer really runs: it shows whether this family's layers return a tuple
        self._reads_tokens |= any(value is tokens for value in kwargs.values())
        self._streams = hidden.shape[2:]
        if index == 0:
            layer = self.layers[0]
            stub = vars(layer).pop("forward")
            try:
                out = layer(hidden, *args, **kwargs)
                self._outputs = len(out) if isinstance(out, tuple) else 0
            finally:
                layer.forward = stub
        return hidden

    @contextmanager
    def _replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        for index, layer in enumerate(self.layers):

            def stub(*args: Any, index: int = index, **kwargs: Any) -> Any:
                out = forward(index, *args, **kwargs)
                return (out,) if self._outputs else out

            layer.forward = stub
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @contextmanager
    def _short_head(self) -> Iterator[None]:
        # embedding needs no logits, and a head over a large vocabulary costs as much as several layers
        head = self.model.get_output_embeddings()
        if head is None:
            yield
            return
        head.forward = lambda x: x[..., :1]
        try:
            yield
        finally:
            del head.forward
