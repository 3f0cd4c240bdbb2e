"""What a plan is expected to gain over a uniform one of the same bytes, and how far that depends on the samples."""

from collections.abc import Iterable, Mapping

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
    record = profile.record
    size = sum(units[unit.name].stored_bytes(unit.shape) for unit in record.units)
    uniform = [record.settings.scheme(width) for width in record.widths]
    sizes = np.array([sum(scheme.stored_bytes(unit.shape) for unit in record.units) for scheme in uniform])
    after = int(np.searchsorted(sizes, size))
    if not 0 < after < len(sizes):
        return {}
    between = (size - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
    rows: dict[Scheme, list[int]] = {}
    for row, unit in enumerate(record.units):
        rows.setdefault(units[unit.name], []).append(row)

    def share(tables: NDArray) -> NDArray:
        """[...] gains for [..., units, widths] sensitivities."""
        ours = sum(scheme_errors(profile, tables, scheme)[..., some].sum(-1) for scheme, some in rows.items())
        narrow, wide = tables[..., after - 1].sum(-1), tables[..., after].sum(-1)
        return 1 - ours / (narrow ** (1 - between) * wide**between)

    found = {}
    for name in names:
        folds = profile.folds(name).double().numpy()
        folds = folds[(folds > 0).any((1, 2))]
        total = folds.sum(0)
        if not len(folds):  # a model that no error changes
            continue
        whole, low, high = float(share(total)), None, None
        if len(folds) > 1:
            reach = _reach(share(total - folds))
            low, high = whole - reach, whole + reach
        found[name] = Gain(share=whole, low=low, high=high)
    return found


def _reach(without: NDArray) -> float:
    """How far a figure reaches, by its values without one fold each: the jackknife, with Student's distribution."""
    from scipy.stats import t

    count = len(without)
    deviation = ((count - 1) / count * np.square(without - without.mean()).sum()) ** 0.5
    return float(t.ppf((1 + _CONFIDENCE) / 2, count - 1) * deviation)
