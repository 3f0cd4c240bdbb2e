"""Adjustments: a few bytes that fit a checkpoint to a novel distribution, from a few samples."""

from moqa.adjust.run import Adjusted, adjust
from moqa.callable import callable_folder

__all__ = ["Adjusted", "adjust"]

callable_folder(__name__, adjust)
