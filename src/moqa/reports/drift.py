"""How much the use of experts and channels differs between two distributions: pure functions of a profile."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moqa.profiling.record import SELF
from moqa.profiling.store import Profile

Array = NDArray[np.float64]
SHARES = (0.01, 0.05, 0.1)


def distributions(profile: Profile) -> tuple[str, ...]:
    """Names of a profile's distributions, the model's own text last."""
    return (*profile.names, *((SELF,) if SELF in profile.statistics else ()))


def pairs(profile: Profile) -> list[tuple[str, str]]:
    """All pairs of distributions of a profile; pairs with the model's own text come last.

    >>> pairs(profile)
    [('wiki', 'novels'), ('wiki', 'self'), ('novels', 'self')]
    """
    return sorted(combinations(distributions(profile), 2), key=lambda pair: SELF in pair)


def rank_correlation(profile: Profile, a: str, b: str) -> float:
    """Spearman correlation of expert significance on two distributions, over the experts of all layers together.

    >>> rank_correlation(profile, "wiki", "wiki")
    1.0

    Returns:
        -1 to 1; NaN if all experts are equally significant on one of the distributions.
    """
    layers = profile.expert_layers
    return _spearman(*(np.concatenate([_experts(profile, name, layer) for layer in layers]) for name in (a, b)))


def layer_rank_correlations(profile: Profile, a: str, b: str) -> list[float]:
    """`rank_correlation` for each expert layer separately."""
    return [_spearman(_experts(profile, a, n), _experts(profile, b, n)) for n in profile.expert_layers]


def drift_concentration(profile: Profile, a: str, b: str, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """Share of the drift between two distributions that is in the channels with the largest drift.

    The drift of a channel is |significance on a - significance on b|, each divided by its sum over the layer.

    >>> drift_concentration(profile, "wiki", "novels")[0.01]
    0.2...

    Args:
        profile: statistics of both distributions.
        a: one distribution.
        b: another.
        shares: fractions of all channels of the model, 0 to 1; at least one channel is counted.

    Returns:
        Fraction of the channels -> fraction of the drift; NaN if there is no drift.
    """
    return concentration(channel_drift(profile, a, b), shares)


def significance_concentration(
    profile: Profile, a: str, b: str, shares: Sequence[float] = SHARES
) -> dict[float, float]:
    """Control: share of the significance (mean of two distributions) that is in the most significant channels.

    If drift were proportional to significance, `drift_concentration` would have these values.
    """
    return concentration(channel_significance(profile, a) + channel_significance(profile, b), shares)


def drift_of_significant(profile: Profile, a: str, b: str, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """Control: share of the drift from `a` to `b` that is in the most significant channels on `a`.

    This is the drift that a choice of channels covers without knowing `b`.
    """
    order = np.argsort(-channel_significance(profile, a), kind="stable")
    return _held(channel_drift(profile, a, b)[order], shares)


def routing_divergence(profile: Profile, a: str, b: str) -> list[float]:
    """Jensen-Shannon divergence of the routing on two distributions, per expert layer, in bits.

    >>> routing_divergence(profile, "wiki", "novels")
    [0.1..., 0.06..., ...]

    Returns:
        0 (same frequency of every expert) to 1 (no expert in common) per layer; NaN if a distribution has no tokens.
    """
    return [_jensen_shannon(_routing(profile, a, n), _routing(profile, b, n)) for n in profile.expert_layers]


def channel_significance(profile: Profile, name: str) -> Array:
    """[channels of all experts of all layers] significance divided by its sum over the layer."""
    return np.concatenate([_channels(profile, name, layer).ravel() for layer in profile.expert_layers])


def channel_drift(profile: Profile, a: str, b: str) -> Array:
    """[channels of all experts of all layers] absolute difference of `channel_significance`."""
    return np.abs(channel_significance(profile, a) - channel_significance(profile, b))


def expert_changes(profile: Profile, a: str, b: str) -> list[tuple[int, int, float]]:
    """Change of each expert's significance from one distribution to another, largest change first.

    >>> expert_changes(profile, "wiki", "novels")[0]
    (5, 12, 0.6...)

    Returns:
        (layer, expert, significance on b minus on a) of every expert.
    """
    changes = [
        (layer, expert, float(change))
        for layer in profile.expert_layers
        for expert, change in enumerate(_experts(profile, b, layer) - _experts(profile, a, layer))
    ]
    return sorted(changes, key=lambda entry: -abs(entry[2]))


def channel_changes(profile: Profile, a: str, b: str, count: int) -> list[tuple[int, int, int, float]]:
    """Change of each channel's share of its layer's significance, largest change first.

    >>> channel_changes(profile, "wiki", "novels", 1)
    [(5, 2, 179, -0.02...)]

    Returns:
        (layer, expert, channel, share on b minus share on a) of the first `count` channels.
    """
    changes = []
    for layer in profile.expert_layers:
        change = _channels(profile, b, layer) - _channels(profile, a, layer)
        for index in np.argsort(-np.abs(change), axis=None, kind="stable")[:count]:
            expert, channel = np.unravel_index(index, change.shape)
            changes.append((layer, int(expert), int(channel), float(change[expert, channel])))
    return sorted(changes, key=lambda entry: -abs(entry[3]))[:count]


def concentration(values: Array, shares: Sequence[float]) -> dict[float, float]:
    """Fraction of the sum of non-negative values that is in the largest values.

    >>> concentration(np.array([6.0, 1.0, 2.0, 1.0]), [0.25, 0.5])
    {0.25: 0.6, 0.5: 0.8}
    """
    return _held(-np.sort(-values), shares)


def _held(ordered: Array, shares: Sequence[float]) -> dict[float, float]:
    total = ordered.sum()
    if not total > 0:
        return dict.fromkeys(shares, math.nan)
    running = np.cumsum(ordered) / total
    return {share: float(running[max(1, round(share * len(ordered))) - 1]) for share in shares}


def _experts(profile: Profile, name: str, layer: int) -> Array:
    return profile.significance(name, layer).double().numpy()


def _channels(profile: Profile, name: str, layer: int) -> Array:
    """[experts, channels] share of the layer's significance."""
    channels = profile.layer(name, layer, "channel").double().numpy()
    return channels / total if (total := channels.sum()) > 0 else channels


def _spearman(left: Array, right: Array) -> float:
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (left, right)]
    scale = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale > 0 else math.nan


def _routing(profile: Profile, name: str, layer: int) -> Array:
    return profile.layer(name, layer, "tokens").double().numpy()


def _jensen_shannon(left: Array, right: Array) -> float:
    if not (left.sum() > 0 and right.sum() > 0):
        return math.nan
    p, q = left / left.sum(), right / right.sum()
    middle = (p + q) / 2
    return max(0.0, float(sum((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum() for x in (p, q)) / 2))
