"""Quantization: the driver that applies a plan layer by layer."""

from moqa.callable import callable_folder
from moqa.methods import METHODS
from moqa.quantize.run import quantize

__all__ = ["METHODS", "quantize"]

callable_folder(__name__, quantize)
