"""How many tokens each expert of a model gets, counted while it reads and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from moqa.errors import MoqaError
from moqa.runtime.packed import PackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RoutingCounts:
    """Counts of a loaded model; nothing is counted before `start`, and no output changes by it.

    >>> counts = RoutingCounts(model)
    >>> counts.start()
    >>> model(ids)
    >>> counts.take().sum(1)
    array([512, 512, 512, 512, 512, 512])

    Tokens are counted wherever `moqa_weights` computes: in prompts, in native decoding, under any adjustment. What an
    observer watches (a profile, an adjustment being made) is not.

    Raises:
        MoqaError: if the model has no packed experts.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._experts = _packed_experts(model)
        if not self._experts:
            raise MoqaError("the model has no packed experts whose tokens could be counted")
        self._rows = [packed.count for packed in self._experts]
        self._table = torch.zeros(len(self._rows), max(self._rows), dtype=torch.int64)
        self._view = self._table.numpy()

    def start(self) -> None:
        """Count from now on."""
        for row, count, packed in zip(self._table, self._rows, self._experts, strict=True):
            packed.count_in(row[:count])

    def stop(self) -> None:
        """Count no longer."""
        for packed in self._experts:
            packed.count_in(None)

    def take(self) -> np.ndarray:
        """[layers with experts, experts] int64 since the last call, and begin again at 0."""
        found = self._view.copy()
        self._view.fill(0)
        return found


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Let what a model computes in a block leave its counts alone."""
    counted = [(packed, packed.counts) for packed in _packed_experts(model) if packed.counts is not None]
    for packed, _ in counted:
        packed.count_in(None)
    try:
        yield
    finally:
        for packed, counts in counted:
            packed.count_in(counts)


def _packed_experts(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]
