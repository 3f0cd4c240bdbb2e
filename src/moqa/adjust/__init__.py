"""Adjustments: a few bytes that fit a checkpoint to a novel distribution, from a few samples."""

from moqa.adjust.run import Adjusted, Search, adjust
from moqa.callable import callable_folder

__all__ = ["Adjusted", "Search", "adjust"]

callable_folder(__name__, adjust)
