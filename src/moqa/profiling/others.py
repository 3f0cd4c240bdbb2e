"""Errors of schemes that a profile does not have, measured on the original's weights alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moqa.format.scheme import Scheme
from moqa.models.view import open_model
from moqa.profiling.sensitivity import compared_errors
from moqa.profiling.store import Profile


def with_errors_of(profile: Profile, schemes: Sequence[Scheme]) -> Profile:
    """A profile that also compares the rounding errors of some schemes with those of its own.

    >>> scheme = Scheme(width=4, symmetric=True)
    >>> with_errors_of(profile, [scheme]).compared(scheme).shape
    torch.Size([312])

    Raises:
        MoqaError: if one is missing in the profile, and the original is no longer where it was.
    """
    record = profile.record
    had = {scheme for scheme in schemes if scheme.is_unquantized or scheme == record.settings.scheme(scheme.width)}
    missing = [scheme for scheme in schemes if scheme not in had and scheme not in record.others]
    if not missing:
        return profile
    view = open_model(profile.original, keep=False)
    with torch.no_grad():
        found = [compared_errors(view, n, record.settings.scheme(8), missing) for n in range(record.layers)]
    measured = profile.weights.get("compared", torch.empty(len(record.units), 0))
    return replace(
        profile,
        record=record.model_copy(update={"others": (*record.others, *missing)}),
        weights=profile.weights | {"compared": torch.cat([measured, torch.cat(found)], 1)},
    )
