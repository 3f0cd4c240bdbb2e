"""Choose evenly spaced samples."""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the phases of successive seeds lie far apart


def evenly_spaced(available: int, count: int, seed: int) -> np.ndarray:
    """[count] different indices below `available`, ascending, int64.

    >>> evenly_spaced(10, 4, seed=0)
    array([0, 2, 5, 7])
    """
    phase = (seed * _GOLDEN % 2**64) * available >> 64
    return (np.arange(count) * available + phase) // count
