"""Profiles: the statistics of a model on some distributions."""

from moqa.profiling.record import SELF, ProfileRecord, UnitRecord
from moqa.profiling.run import DEFAULT_CONTEXT, DEFAULT_SAMPLES, profile
from moqa.profiling.store import Profile, read_profile

__all__ = [
    "DEFAULT_CONTEXT", "DEFAULT_SAMPLES", "SELF", "Profile", "ProfileRecord", "UnitRecord", "profile",
    "read_profile",
]  # fmt: skip
