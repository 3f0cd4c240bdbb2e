"""What a plan is expected to gain over a uniform one of the same bytes, and how far that depends on the samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moqa.format.scheme import Scheme
from moqa.planning.problem import scheme_errors
from moqa.planning.record import Gain
from moqa.profiling import Profile

_CONFIDENCE = 0.95


def expected_gains(profile: Profile, units: Mapping[str, Scheme], names: Iterable[str]) -> dict[str, Gain]:
    """Distribution -> gain of a plan; empty if its size is beyond all uniform plans of the profile's own scheme.

    The divergence of a uniform plan of the same bytes is interpolated between two widths, both on a scale of powers.

    >>> expected_gains(profile, plan.units, ["wiki"])["wiki"].share < 1
    True

    Args:
        profile: that the plan was made from.
        units: unit name -> scheme.
        names: distributions.
    """
    share = over_uniform(profile, units)
    folds = {name: used_folds(profile, name) for name in names}
    # a model that no error changes has none
    return {} if share is None else {name: jackknifed([some], share) for name, some in folds.items() if len(some)}


def over_uniform(profile: Profile, units: Mapping[str, Scheme]) -> Callable[[NDArray], NDArray] | None:
    """Function of [..., units, widths] sensitivities that gives the share of a uniform plan's divergence that is saved.

    None for a size that no uniform plan of the profile's own scheme has; see `expected_gains`.
    """
    record = profile.record
    size = sum(units[unit.name].stored_bytes(unit.shape) for unit in record.units)
    uniform = [record.settings.scheme(width) for width in record.widths]
    sizes = np.array([sum(scheme.stored_bytes(unit.shape) for unit in record.units) for scheme in uniform])
    after = int(np.searchsorted(sizes, size))
    if not 0 < after < len(sizes):
        return None
    between = (size - sizes[after - 1]) / (sizes[after] - sizes[after - 1])

    def share(tables: NDArray) -> NDArray:
        narrow, wide = tables[..., after - 1].sum(-1), tables[..., after].sum(-1)
        return 1 - total_errors(profile, tables, units) / (narrow ** (1 - between) * wide**between)

    return share


def used_folds(profile: Profile, name: str) -> NDArray[np.float64]:
    """[folds, units, widths] what the folds of a distribution's samples add to the sensitivity, without empty ones."""
    folds = profile.folds(name).double().numpy()
    return folds[(folds > 0).any((1, 2))]


def total_errors(profile: Profile, tables: NDArray, units: Mapping[str, Scheme]) -> NDArray:
    """[...] sums over all units, stored by some schemes, for [..., units, measured widths] tables of errors."""
    rows: dict[Scheme, list[int]] = {}
    for row, unit in enumerate(profile.record.units):
        rows.setdefault(units[unit.name], []).append(row)
    sums = [scheme_errors(profile, tables, scheme)[..., some].sum(-1) for scheme, some in rows.items()]
    return np.sum(sums, axis=0)


def jackknifed(folds: Sequence[NDArray], share: Callable[[NDArray], NDArray]) -> Gain:
    """A gain, and how far it reaches by its values without one fold each, with Student's distribution.

    Args:
        folds: of each distribution, [folds, units, widths]; what distributions have in common is not left to chance.
        share: [...] gains for [..., units, widths] sums.
    """
    from scipy.stats import t

    total = sum((some.sum(0) for some in folds), np.zeros(folds[0].shape[1:]))
    whole = float(share(total))
    without = [share(total - some) for some in folds if len(some) > 1]
    if not without:
        return Gain(share=whole, low=None, high=None)
    variance = sum((len(some) - 1) / len(some) * np.square(some - some.mean()).sum() for some in without)
    reach = float(t.ppf((1 + _CONFIDENCE) / 2, sum(len(some) - 1 for some in without)) * variance**0.5)
    return Gain(share=whole, low=whole - reach, high=whole + reach)
