"""Run a model one block at a time, through its own forward, whatever family it is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moqa.errors import MoqaError, one_line
from moqa.models.attributes import having
from moqa.models.building import BUILDING, quiet
from moqa.tasks import Task, task_of
from moqa.tasks.names import shared_caches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# placeholder for a batch's inputs in the recorded arguments of a block
_INPUTS = object()


class LayerwiseModel:
    """The stages of a forward pass: embed, each block, head.

    >>> stages = LayerwiseModel(view.model)
    >>> hidden = stages.embed(tokens)
    >>> for index in range(stages.depth):
    ...     hidden = stages.run_block(index, hidden)
    >>> torch.equal(stages.head(hidden), view.model(tokens).logits)
    True

    The model's own forward runs with the forward of every block replaced, so whatever a family does before, between
    and after its blocks (scaled embeddings, masks by layer type, capped logits) happens here too. All windows of a
    batch are full: no padding. Hidden states hold everything that a block reads: the features of all residual streams,
    and, where blocks look at token ids (experts chosen by a table), the token id as a last feature.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model, self.task = model, task_of(model.config)
        self.blocks = [model.get_submodule(path) for path in self.task.blocks(model)]
        self.depth = len(self.blocks)
        self._calls: dict[torch.Size, list[tuple[tuple, dict]]] = {}
        self._outputs = 0  # length of the tuple that a block returns; 0 if it returns a tensor
        self._streams, self._reads_tokens = torch.Size(), False
        probe = self.task.probe(model).as_subclass(_FromInputs)
        try:
            with torch.no_grad(), self._replaced(partial(self._probe, probe)):
                self._call(probe)
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
            problem = f"{type(model).__name__} cannot be run one block at a time"
            reason = "its blocks return more than hidden states: " if self._outputs > 1 else ""
            raise MoqaError(problem, f"{reason}{one_line(error)}") from None

    def embed(self, inputs: Tensor) -> Tensor:
        """Input of the first block: [batch, context] tokens -> [batch, context, features], images -> [batch, ...]."""
        first: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def record(_: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            calls.append((args, {k: _INPUTS if v is inputs else v for k, v in kwargs.items()}))
            return self._passed_on(hidden, len(calls))

        with torch.no_grad(), self._replaced(record), self._short_head():
            self._call(inputs)
        self._calls[inputs.shape[: self.task.batch_dims]] = calls
        return self._joined(first[0], inputs)

    def run_block(self, index: int, hidden: Tensor) -> Tensor:
        """Output of block `index` for its input; differentiable where torch records gradients."""
        args, kwargs = self._calls[hidden.shape[: self.task.batch_dims]][index]
        states, tokens = self._parted(hidden)
        out = self.blocks[index](states, *args, **{k: tokens if v is _INPUTS else v for k, v in kwargs.items()})
        return self._joined(out[0] if isinstance(out, tuple) else out, tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits from the last block's output: [batch, context, vocabulary], of images [batch, classes]."""
        states, _ = self._parted(hidden)
        with self._replaced(lambda *_, **__: states):
            return self.task.call(self.model, self.task.stand_in(self.model, hidden))

    def _joined(self, states: Tensor, tokens: Tensor | None) -> Tensor:
        """Hidden states between two blocks; of language models [batch, context, features]."""
        if not self.task.predicts_each:
            return states
        flat = states.flatten(2)
        # float32 holds the ids of any vocabulary
        return torch.cat([flat, tokens[..., None].float()], -1) if self._reads_tokens and tokens is not None else flat

    def _parted(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The reverse of `_joined`: what a block is called with, and the token ids if it reads them."""
        tokens = None
        if self._reads_tokens:
            hidden, tokens = hidden[..., :-1].to(self.model.dtype), hidden[..., -1].long()
        several = self.task.predicts_each and len(self._streams) > 1
        return hidden.unflatten(2, self._streams) if several else hidden, tokens

    def _probe(self, tokens: Tensor, index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # only the first block really runs: it shows whether the blocks of this family return a tuple
        self._reads_tokens |= any(value is tokens for value in kwargs.values())
        others = [value for value in tree_leaves((args, kwargs)) if value is not tokens]
        if any(isinstance(value, _FromInputs) for value in others) or shared_caches(self.model.config):
            raise ValueError("its blocks read more of a text than hidden states and token ids")
        hidden = hidden.as_subclass(Tensor)
        self._streams = hidden.shape[2:]
        if index == 0:
            layer = self.blocks[0]
            stub = vars(layer).pop("forward")
            try:
                out = layer(hidden, *args, **kwargs)
                self._outputs = len(out) if isinstance(out, tuple) else 0
            finally:
                layer.forward = stub
        return self._passed_on(hidden, index + 1)

    def _call(self, inputs: Tensor) -> None:
        with suppress(_AllSeenError):
            self.task.call(self.model, inputs)

    def _passed_on(self, hidden: Tensor, called: int) -> Tensor:
        """Stands for a block's output while nothing is computed; `called` counts the blocks so far."""
        # where blocks change the shape of hidden states, what follows them cannot take the first block's input
        if called == self.depth and not self.task.predicts_each:
            raise _AllSeenError
        return hidden

    @contextmanager
    def _replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        def stub(index: int, *args: Any, **kwargs: Any) -> Any:
            out = forward(index, *args, **kwargs)
            return (out,) if self._outputs else out

        with ExitStack() as stack:
            for index, layer in enumerate(self.blocks):
                stack.enter_context(having(layer, "forward", partial(stub, index)))
            yield

    def _short_head(self) -> AbstractContextManager[None]:
        # embedding needs no logits, and a head over a large vocabulary costs as much as several layers
        head = self.model.get_output_embeddings() if self.task.predicts_each else None
        return nullcontext() if head is None else having(head, "forward", lambda x: x[..., :1])


class _FromInputs(Tensor):
    """A batch's inputs, and, by torch's rules for subclasses, all that is computed from them."""


class _AllSeenError(Exception):
    """Every block was called: what follows them is not needed."""


def largest_stream(model: "PreTrainedModel", task: Task) -> int:
    """Largest number of values between two blocks for one sample, from shapes alone: nothing is computed.

    >>> from moqa.models.view import open_model
    >>> resnet = open_model("reference/image/model")
    >>> largest_stream(resnet.model, resnet.task)
    2048
    """
    with BUILDING, quiet(), torch.device("meta"):
        copy = task.auto_class(model.config).from_config(model.config).eval()
    sizes = [0]

    def see(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        sizes.extend((args[0].numel(), first.numel()))

    for path in task.blocks(copy):
        copy.get_submodule(path).register_forward_hook(see)
    task.call(copy, task.probe(copy).to("meta"))
    return max(sizes)
