"""What the router of a block does with some tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.models.coverage import router_paths
from moqa.models.experts import ExpertRun
from moqa.models.view import ModelView
from moqa.models.watch import watching
from moqa.reduction.registry import Routed


class RouterSeen:
    """Running sums of a block's router logits and of the tokens of its experts.

    Args:
        router: whose weight has a row for each expert.
        experts: number of experts.
    """

    def __init__(self, router: nn.Module, experts: int) -> None:
        self._router, self._count = router, 0
        self._tokens = torch.zeros(experts, dtype=torch.int64)
        self._sum, self._products = torch.zeros(experts).double(), torch.zeros(experts, experts).double()

    def logits(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Called before the router with its input."""
        weight: Tensor = self._router.weight  # type: ignore[assignment]
        x = args[0].reshape(-1, weight.shape[1])
        found = (x.float() @ weight.float().T).double()
        self._count += len(found)
        self._sum += found.sum(0)
        self._products += found.T @ found

    def routed(self, index: Tensor, weights: Tensor) -> None:  # noqa: ARG002
        """See `ExpertsObserver`."""
        experts = len(self._tokens)
        self._tokens += torch.bincount(index.flatten(), minlength=experts)[:experts]

    def expert(self, run: ExpertRun) -> None:
        """See `ExpertsObserver`."""

    def result(self) -> Routed:
        """What was seen."""
        mean = self._sum / max(self._count, 1)
        covariance = self._products / max(self._count, 1) - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp_min(0).sqrt().clamp_min(1e-12)
        return Routed(self._tokens, (covariance / deviation / deviation[:, None]).clamp(-1, 1).float())


@contextmanager
def seeing(view: ModelView, layer: int) -> Iterator[RouterSeen]:
    """Within `with`, collect what the router of a block does.

    Raises:
        MoqaError: if its router has no row for each expert.
    """
    router, experts = router_of(view, layer), view.experts(layer).num_experts
    seen = RouterSeen(router, experts)
    hook = router.register_forward_pre_hook(seen.logits)
    try:
        with watching(view, layer, seen):
            yield seen
    finally:
        hook.remove()


def router_of(view: ModelView, layer: int) -> nn.Module:
    """The router of a block.

    >>> router_of(view, 0).weight.shape
    torch.Size([16, 256])

    Raises:
        MoqaError: if none has a row for each expert.
    """
    experts = view.experts(layer).num_experts
    for path in router_paths(view.model, view.blocks):
        try:
            router = view.blocks[layer].get_submodule(path)
        except AttributeError:
            continue
        weight = getattr(router, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts:
            return router
    raise MoqaError(
        f"the routers of {view.model.config.model_type} have no row for each of the {experts} experts of block {layer}",
        "experts of such a family cannot be reduced",
    )
