"""What a router reads: embedding rows of tokens, the experts that they are routed to, or pixels."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from moqa.calibration.hidden import HiddenStates
from moqa.errors import MoqaError
from moqa.mixture.router import LONGEST, SIDE, Reads
from moqa.models.experts import ExpertRun, observed
from moqa.models.layerwise import LayerwiseModel
from moqa.runtime.packed import PackedExperts, unpacked
from moqa.runtime.routing import uncounted
from moqa.storage.in_memory import InMemoryRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def read(model: "PreTrainedModel", inputs: Tensor, what: Reads) -> Tensor:
    """[texts, tokens, features] what a router reads of each token, or [images, 1, channels, 32, 32] of images, float32.

    >>> read(model, torch.tensor([[599, 3523, 298]]), "routing").shape  # 6 layers of 16 experts
    torch.Size([1, 3, 96])

    The embedding is stored unquantized, so its rows are the original's; the routing is that of the variant in use.

    Args:
        model: a checkpoint.
        inputs: [texts, tokens] int64, or [images, channels, height, width] pixels.
        what: of them.

    Raises:
        MoqaError: if the routing is asked for, and the model has no routed experts.
    """
    if what == "pixels":
        return adaptive_avg_pool2d(inputs.float(), SIDE)[:, None]
    return _rows(model, inputs) if what == "rows" else _routing(model, inputs)


def seen_of(sample: "Sequence[int] | Tensor", what: Reads) -> Tensor:
    """[1, ...] the part of one prompt, or image, that a router reads.

    Raises:
        MoqaError: if a prompt has no token, or pixels are not those of one image.
    """
    if what != "pixels":
        return prompt_end(sample)
    if not isinstance(sample, Tensor) or sample.dim() != 3:
        shape = list(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise MoqaError(f"the mixture was given {shape}", "its router reads [channels, height, width] pixels")
    return sample[None]


def prompt_end(ids: "Sequence[int] | Tensor") -> Tensor:
    """[1, tokens] the end of a prompt, which is what routers read.

    >>> prompt_end([599, 3523]).shape
    torch.Size([1, 2])

    Raises:
        MoqaError: if there is no token.
    """
    if not len(ids):
        raise MoqaError("the prompt has no tokens", "a router needs at least one")
    return torch.as_tensor(ids, dtype=torch.int64)[None, -LONGEST:]


def _rows(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    table = model.get_input_embeddings()
    assert table is not None
    rows: Tensor = table(ids.to(model.device))
    return rows.float().cpu()


def _routing(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    experts = [m for m in model.modules() if isinstance(getattr(m, "moqa_weights", None), PackedExperts)]
    if not experts:
        raise MoqaError("--router histogram needs a model with routed experts", "choose encoder or linear")
    seen, stages = [_TokenRoutes() for _ in experts], LayerwiseModel(model)
    hidden = HiddenStates(stages, InMemoryRun(), "prompts", stages.task.batches(ids.to(model.device)))
    with ExitStack() as stack, uncounted(model):
        for module, routes in zip(experts, seen, strict=True):
            stack.enter_context(observed(cast(Any, module), routes))
        for layer, block in enumerate(stages.blocks):
            with unpacked(block):
                hidden.advance(layer, keep=False)
    counts = [cast(PackedExperts, module.moqa_weights).count for module in experts]
    shares = [routes.shares(count, ids.shape) for routes, count in zip(seen, counts, strict=True)]
    return torch.cat(shares, -1)


class _TokenRoutes:
    """The experts of every token of one block; see `ExpertsObserver`."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def routed(self, index: Tensor, weights: Tensor) -> None:  # noqa: ARG002
        self._seen.append(index.detach().cpu())

    def expert(self, run: ExpertRun) -> None:
        """Only the choice matters here."""

    def shares(self, experts: int, shape: torch.Size) -> Tensor:
        """[texts, tokens, experts] 1 / k for each of a token's k experts."""
        index = torch.cat(self._seen)
        # an index past the last expert stands for none
        found = one_hot(index, experts + 1).sum(1)[:, :experts].float() / index.shape[1]
        return found.reshape(*shape, experts)
