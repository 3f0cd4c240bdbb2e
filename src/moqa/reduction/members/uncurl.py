"""`uncurl`: experts that the router treats alike become one."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqa.reduction.registry import Routed, reduction

_ROUNDS = 100


@reduction("uncurl")
def uncurl(seen: Routed, count: int, seed: int) -> Tensor:
    """Merge experts whose router logits rise and fall together: spectral clustering of their correlation.

    The affinity of two experts is exp(correlation) (ours: the paper names the clustering, not the affinity). Experts
    without tokens are as close to others as their logits say, and weigh nothing where they are merged.

    UNCURL (arXiv 2409.01483).
    """
    affinity = np.exp(seen.correlation.double().numpy())
    degree = affinity.sum(1) ** -0.5
    _, vectors = np.linalg.eigh(degree[:, None] * affinity * degree)
    points = vectors[:, -count:]
    # a vector's sign is arbitrary, distances do not depend on it
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return torch.from_numpy(in_order(k_means(points, count, np.random.default_rng(seed))))


def k_means(points: NDArray[np.float64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Cluster of every point; no cluster is empty.

    >>> k_means(np.array([[0.0], [0.1], [5.0]]), 2, np.random.default_rng(0)).tolist()
    [0, 0, 1]

    Args:
        points: [points, features].
        count: clusters.
        generator: draws the first centre; each further one is the point that is farthest from all before.
    """
    centres = points[[int(generator.integers(len(points)))]]
    while len(centres) < count:
        centres = np.vstack([centres, points[_distances(points, centres).min(1).argmax()]])
    cluster = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        distances = _distances(points, centres)
        found = distances.argmin(1)
        for empty in sorted(set(range(count)) - set(found.tolist())):
            # the point that fits its cluster the worst, of those that are not alone
            alone = np.bincount(found, minlength=count)[found] == 1
            worst = np.where(alone, -1.0, distances[np.arange(len(points)), found]).argmax()
            found[worst] = empty
        if (found == cluster).all():
            break
        cluster = found
        centres = np.stack([points[cluster == index].mean(0) for index in range(count)])
    return in_order(cluster)


def in_order(cluster: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same clusters, numbered by their first members.

    >>> in_order(np.array([2, 0, 2, 1])).tolist()
    [0, 1, 0, 2]
    """
    first = {name: number for number, name in enumerate(dict.fromkeys(cluster.tolist()))}
    return np.array([first[name] for name in cluster.tolist()])


def _distances(points: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.square(points[:, None] - centres[None]).sum(2)
