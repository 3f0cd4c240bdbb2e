"""How often tokens are routed to the experts that the original routes them to."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from moqa.models.experts import ExpertRun, observed
from moqa.models.view import ModelView


class Routes:
    """The experts of every token that passes through a model, block by block.

    >>> routes = Routes()
    >>> with routes.recorded(view, range(6)):
    ...     logits = view.model(tokens).logits
    >>> routes.agreement(routes)
    1.0
    """

    def __init__(self) -> None:
        self._blocks: list[_BlockRoutes] = []

    @contextmanager
    def recorded(self, view: ModelView, blocks: Iterable[int]) -> Iterator[None]:
        """Inside this context, the routing of some blocks is recorded."""
        paths = [path for block in blocks if (path := view.experts_path(block)) is not None]
        self._blocks = [_BlockRoutes() for _ in paths]
        with ExitStack() as stack:
            for path, routes in zip(paths, self._blocks, strict=True):
                stack.enter_context(observed(view.module(path), routes))
            yield

    def agreement(self, other: "Routes") -> float | None:
        """Share of a token's experts that are also those of the same token elsewhere; None without experts."""
        shares = [
            (torch.cat(mine.seen)[:, :, None] == torch.cat(its.seen)[:, None]).any(-1).float().mean()
            for mine, its in zip(self._blocks, other._blocks, strict=True)
        ]
        return float(torch.stack(shares).mean()) if shares else None


class _BlockRoutes:
    """Of one block; see `ExpertsObserver`."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def routed(self, index: Tensor, weights: Tensor) -> None:  # noqa: ARG002
        self.seen.append(index.detach().clone())

    def expert(self, run: ExpertRun) -> None:
        """Only the choice matters here."""
