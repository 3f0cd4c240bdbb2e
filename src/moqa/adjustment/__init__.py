"""Adjustments: a few bytes that fit a checkpoint to a novel distribution, from a few samples."""

from moqa.adjustment.run import Adjusted, Search, adjust

__all__ = ["Adjusted", "Search", "adjust"]
