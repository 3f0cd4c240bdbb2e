"""Quantization: methods, and the driver that applies a plan layer by layer."""

from moqa.quantize.methods import METHODS
from moqa.quantize.run import quantize

__all__ = ["METHODS", "quantize"]
