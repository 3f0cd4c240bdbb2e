"""What a client tells of itself before the first round: speed, data, and what rounding does to the model on them."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from moqa.errors import MoqaError
from moqa.federated.modes import Kind, LocalMode, in_mode, rounded
from moqa.federated.skew import BUCKETS, private

Loss = Callable[[nn.Module, Any], Tensor]
# batches that are trained on in each mode, the first to warm up
_TIMED = 4


@dataclass(frozen=True)
class ClientMeasurement:
    """What a client tells of itself; no sample leaves it.

    Attributes:
        samples: that it has.
        per_sample: seconds of training on one, by kind of mode.
        histogram: [classes] counts of labels, or of tokens by their number modulo 256; noisy if it was asked for.
        damage: of rounding the model after training: squared error of its outputs on the probe batch, relative to
            their size.
        loss: of the model as it is, on the probe batch.
        loss_rounded: of the rounded model.
    """

    samples: int
    per_sample: dict[Kind, float]
    histogram: list[float]
    damage: float
    loss: float
    loss_rounded: float


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int,
    *,
    keep: Collection[str] = (),
    loss: Loss | None = None,
    epsilon: float | None = None,
) -> ClientMeasurement:
    """Train a copy of a model on a few batches in each mode, and count the labels.

    >>> images, labels = torch.randn(8, 64), torch.arange(8) % 2
    >>> measure(nn.Linear(64, 2), [(images, labels)], bits=3).histogram
    [4.0, 4.0]

    Args:
        model: as it was received.
        batches: (inputs, labels), or what transformers' models take: a mapping with `labels`.
        bits: of the modes that round.
        keep: patterns of module names that are not rounded.
        loss: of model and batch; by default cross-entropy, or what a transformers model returns.
        epsilon: of local differential privacy; None counts without noise.

    Raises:
        MoqaError: if there is no batch, or the model cannot be rounded.
    """
    loss = loss or batch_loss
    counts, samples, probes = np.zeros(0), 0, list[Any]()
    for batch in batches:
        labels = labels_of(batch)
        samples += len(labels)
        own = np.bincount(_classes(labels))
        counts = _padded(counts, len(own)) + _padded(own, len(counts))
        if len(probes) < _TIMED:
            probes.append(batch)
    if not probes:
        raise MoqaError("this client has no data", "leave it out, or give it samples")
    if epsilon is not None:
        counts = private(counts, epsilon, np.random.default_rng())
    modes: dict[Kind, LocalMode] = {"fp": LocalMode("fp", 32), "qat": LocalMode("qat", bits)}
    times = {kind: _per_sample(copy.deepcopy(model), probes, mode, keep, loss) for kind, mode in modes.items()}
    plain, few = LocalMode("fp", 32), LocalMode("ptq", bits)
    exact = probe_outputs(model, probes[0], plain, keep)
    damage = ((probe_outputs(model, probes[0], few, keep) - exact).square().mean() / exact.square().mean()).item()
    return ClientMeasurement(
        samples, times | {"ptq": times["fp"]}, counts.tolist(), damage if np.isfinite(damage) else 1.0,
        probe_loss(model, probes[0], plain, keep, loss), probe_loss(model, probes[0], few, keep, loss),
    )  # fmt: skip


def batch_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of (inputs, labels), or the loss that a transformers model returns for a mapping.

    >>> batch_loss(nn.Linear(4, 2), (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))).shape
    torch.Size([])
    """
    if isinstance(batch, Mapping):
        return model(**batch).loss
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def labels_of(batch: Any) -> Tensor:
    """Labels of a batch, see `batch_loss`."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]


@torch.no_grad()
def probe_loss(model: nn.Module, batch: Any, mode: LocalMode, keep: Collection[str], loss: Loss) -> float:
    """Loss of a model on one batch, as it is with mode `fp`, else rounded."""
    training = model.training
    model.eval()
    with rounded(model, mode, keep):
        found = loss(model, batch).item()
    model.train(training)
    return found


@torch.no_grad()
def probe_outputs(model: nn.Module, batch: Any, mode: LocalMode, keep: Collection[str]) -> Tensor:
    """Outputs of a model on one batch, as it is with mode `fp`, else rounded."""
    training = model.training
    model.eval()
    with rounded(model, mode, keep):
        found: Tensor = model(**batch).logits if isinstance(batch, Mapping) else model(batch[0])
    model.train(training)
    return found.float()


def train_steps(model: nn.Module, batches: Iterable[Any], loss: Loss, optimizers: Sequence[Optimizer]) -> int:
    """One step for each batch; returns the number of samples."""
    samples = 0
    model.train()
    for batch in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        samples += len(labels_of(batch))
    return samples


def _per_sample(model: nn.Module, batches: list[Any], mode: LocalMode, keep: Collection[str], loss: Loss) -> float:
    with in_mode(model, mode, keep):
        still = [torch.optim.SGD(model.parameters(), lr=0.0)]
        train_steps(model, islice(batches, 1), loss, still)
        start = time.perf_counter()
        samples = train_steps(model, batches[1:] or batches, loss, still)
        return (time.perf_counter() - start) / samples


def _classes(labels: Tensor) -> Any:
    # a language model has labels for every token, -100 where none is predicted
    flat = labels.flatten()
    return (flat[flat >= 0] % BUCKETS if labels.dim() > 1 else flat).numpy()


def _padded(counts: Any, length: int) -> Any:
    return np.pad(np.asarray(counts, float), (0, max(0, length - len(counts))))
