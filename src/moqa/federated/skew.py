"""How far a client's data are from everybody's, told from counts of labels or tokens."""

import numpy as np
from numpy.typing import NDArray

# tokens are counted in so many buckets: a vocabulary would be larger than the update
BUCKETS = 256


def jensen_shannon(one: NDArray, other: NDArray) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 if they are proportional, 1 if they share nothing.

    >>> jensen_shannon(np.array([1, 0]), np.array([0, 3]))
    1.0

    Args:
        one: [classes] counts.
        other: [classes] counts.

    Lin: Divergence measures based on the Shannon entropy (IEEE Trans. Inf. Theory 1991), with equal weights.
    """
    shares = np.stack([one, other]).astype(float)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-300)
    middle = shares.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / middle), 0.0)
    return float(np.clip(terms.sum() / 2, 0.0, 1.0))


def skews(histograms: NDArray) -> NDArray[np.float64]:
    """Divergence of every client's histogram from the sum of all.

    >>> skews(np.array([[5, 5], [5, 5]]))
    array([0., 0.])

    Args:
        histograms: [clients, classes] counts.
    """
    total = histograms.sum(0)
    return np.array([jensen_shannon(own, total) for own in histograms])


def private(histogram: NDArray, epsilon: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """A histogram that tells little of any one sample: with noise from the Laplace distribution, none below 0.

    >>> private(np.array([100, 0]), epsilon=1e9, generator=np.random.default_rng(0)).round()
    array([100.,   0.])

    Args:
        histogram: [classes] counts.
        epsilon: of local differential privacy, for one sample more or less.
        generator: of the noise; seed it with what nobody can guess.

    Dwork, McSherry, Nissim, Smith: Calibrating noise to sensitivity (TCC 2006), for a sensitivity of 1.
    """
    return np.maximum(histogram + generator.laplace(0.0, 1.0 / epsilon, len(histogram)), 0.0)
