"""Counts of the tokens that each expert of a model receives, while the model is used."""

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
    """Counts of a loaded model; nothing is counted before `start`, and outputs do not change.

    >>> counts = RoutingCounts(model)
    >>> counts.start()
    >>> logits = model(tokens).logits
    >>> counts.take().sum(1)
    array([64, 64, 64, 64, 64, 64])
    >>> counts.stop()

    Tokens are counted wherever `moqa_weights` computes: in prompts, in native decoding, with any adjustment. Runs under
    an observer (for a profile, or while an adjustment is made) are not counted.

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
        """Stop counting."""
        for packed in self._experts:
            packed.count_in(None)

    def take(self) -> np.ndarray:
        """[layers with experts, experts] int64 counts since the last call; they are reset to 0."""
        counts = self._view.copy()
        self._view.fill(0)
        return counts


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Count nothing that a model computes inside this context."""
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
