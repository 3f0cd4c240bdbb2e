"""Quantization: the driver that applies a plan block by block."""

from moqa.methods import METHODS
from moqa.quantization.run import quantize

__all__ = ["METHODS", "quantize"]
