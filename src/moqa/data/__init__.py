"""Distributions: named texts, the token windows cut from them, and the check that no text is used twice."""

from moqa.data.overlap import MAX_OVERLAP, overlap_share, refuse_overlap, shingles
from moqa.data.source import Data, Distribution, as_distributions, read_distribution, read_distributions
from moqa.data.windows import Windows, cut_windows, split_held_out

__all__ = [
    "MAX_OVERLAP",
    "Data",
    "Distribution",
    "Windows",
    "as_distributions",
    "cut_windows",
    "overlap_share",
    "read_distribution",
    "read_distributions",
    "refuse_overlap",
    "shingles",
    "split_held_out",
]
