"""Fuzzy c-means for scalar values."""

import numpy as np
from numpy.typing import NDArray

_STEPS = 1000


def fuzzy_c_means(
    values: NDArray[np.float64], clusters: int, fuzzifier: float = 2.0, tolerance: float = 1e-5
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cluster scalar values; deterministic, because the centres start at quantiles.

    >>> centres, membership = fuzzy_c_means(np.array([0.0, 0.1, 1.0, 1.1]), clusters=2)
    >>> membership.argmax(1)
    array([0, 0, 1, 1])

    Args:
        values: [n] numbers.
        clusters: number of clusters.
        fuzzifier: m of the paper, above 1; close to 1, memberships are nearly 0 or 1.
        tolerance: stop when no membership changes by more than this.

    Returns:
        [clusters] centres, ascending, and [n, clusters] memberships that sum to 1.

    MoQa (arXiv 2503.21135), algorithm 1.
    """
    centres = np.quantile(values, (np.arange(clusters) + 0.5) / clusters)
    membership = np.zeros((len(values), clusters))
    for _ in range(_STEPS):
        distance = np.maximum(np.abs(values[:, None] - centres[None]), 1e-12)
        closeness = (distance.min(1, keepdims=True) / distance) ** (2 / (fuzzifier - 1))
        new = closeness / closeness.sum(1, keepdims=True)
        weight = new**fuzzifier
        centres = (weight * values[:, None]).sum(0) / np.maximum(weight.sum(0), 1e-300)
        done = np.abs(new - membership).max() < tolerance
        membership = new
        if done:
            break
    order = np.argsort(centres, kind="stable")
    return centres[order], membership[:, order]
