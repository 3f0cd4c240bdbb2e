"""Statistics that only some strategies read: measured on the original when a plan needs them, not by every profile."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moqa.errors import MoqaError
from moqa.memory.limit import MemoryLimit
from moqa.models.view import ModelView, open_model
from moqa.originals.folder import locate
from moqa.originals.reader import OriginalReader
from moqa.profiling.similarity import block_similarity
from moqa.profiling.store import Profile
from moqa.profiling.swapped import swapped_divergence
from moqa.profiling.weights import outlier_scores, spectra

# of the weights alone: name -> [units, ...]
_OF_WEIGHTS: dict[str, Callable[[ModelView, int], Tensor]] = {"outliers": outlier_scores, "spectrum": spectra}
# of a distribution
_OF_TEXTS: dict[str, Callable[[ModelView, Tensor, Profile], Tensor]] = {
    "similarity": lambda view, samples, _: block_similarity(view, samples),
    "divergence": lambda view, samples, profile: swapped_divergence(
        view, samples, profile.record.settings.scheme(8), profile.weights["rounding"], profile.record.widths
    ),
}
# windows of a distribution that are enough to compare blocks
_WINDOWS = 4


@torch.no_grad()
def with_further(profile: Profile, names: Sequence[str], known: Sequence[str], asked: str) -> Profile:
    """A profile that also has some statistics that profiles do not hold.

    >>> with_further(profile, ["outliers"], ["wiki"], "--strategy outliers-first").weights["outliers"].shape
    torch.Size([312])

    Args:
        profile: its `weights` and `statistics` get new entries.
        names: of the statistics: `outliers` and `spectrum` of the weights, see `moqa.profiling.weights`;
            `similarity` and `divergence` of distributions.
        known: distributions that may be used.
        asked: what the user typed that needs them.

    Raises:
        MoqaError: if one is missing in the profile, and the original is no longer where it was.
    """
    missing = [name for name in names if name in _OF_WEIGHTS and name not in profile.weights]
    absent = [(d, n) for n in names if n in _OF_TEXTS for d in known if n not in profile.statistics[d]]
    if not missing and not absent:
        return profile
    try:
        folder = locate(profile.original)
        view = open_model(folder, keep=MemoryLimit.free().holds(OriginalReader(folder).values))
    except MoqaError as error:
        raise MoqaError(f"{asked} measures {', '.join(names)} of the original", str(error)) from None
    weights = dict(profile.weights)
    for name in missing:
        weights[name] = torch.cat([_OF_WEIGHTS[name](view, layer) for layer in range(profile.record.layers)])
    statistics = {name: dict(found) for name, found in profile.statistics.items()}
    for text, name in absent:
        statistics[text][name] = _OF_TEXTS[name](view, profile.samples(text)[:_WINDOWS], profile)
    return replace(profile, weights=weights, statistics=statistics)
