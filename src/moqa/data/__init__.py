"""Distributions: named texts, images or demonstrations, the samples cut from them, and the check for overlap."""

from moqa.data.demonstrations import Demonstrations, ObservationSamples, read_demonstrations, split_demonstrations
from moqa.data.images import Images, ImageSamples, cut_images, read_images, split_images
from moqa.data.overlap import MAX_OVERLAP, overlap_share, refuse_overlap, shingles
from moqa.data.source import (
    Data,
    Distribution,
    Source,
    as_distributions,
    as_text,
    read_distribution,
    read_distributions,
)
from moqa.data.windows import Windows, cut_windows, prompt_start, split_held_out

__all__ = [
    "MAX_OVERLAP",
    "Data",
    "Demonstrations",
    "Distribution",
    "ImageSamples",
    "Images",
    "ObservationSamples",
    "Source",
    "Windows",
    "as_distributions",
    "as_text",
    "cut_images",
    "cut_windows",
    "overlap_share",
    "prompt_start",
    "read_demonstrations",
    "read_distribution",
    "read_distributions",
    "read_images",
    "refuse_overlap",
    "shingles",
    "split_demonstrations",
    "split_held_out",
    "split_images",
]
