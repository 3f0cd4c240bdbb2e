"""Profiles: all statistics of a model on some distributions."""

from moqa.callable import callable_folder
from moqa.profile.record import SELF, ProfileRecord, UnitRecord
from moqa.profile.run import DEFAULT_CONTEXT, DEFAULT_SAMPLES, profile
from moqa.profile.store import Profile, read_profile

__all__ = [
    "DEFAULT_CONTEXT", "DEFAULT_SAMPLES", "SELF", "Profile", "ProfileRecord", "UnitRecord", "profile",
    "read_profile",
]  # fmt: skip

callable_folder(__name__, profile)
