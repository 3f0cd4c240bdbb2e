"""Which of many samples are taken."""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the phases of successive seeds lie far apart


def evenly_spaced(available: int, count: int, seed: int) -> np.ndarray:
    """[count] different indices below `available`, ascending, int64."""
    phase = (seed * _GOLDEN % 2**64) * available >> 64
    return (np.arange(count) * available + phase) // count
