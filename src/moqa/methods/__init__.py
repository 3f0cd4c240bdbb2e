"""Quantization methods: from weights and what they are multiplied with to what is stored. One file per method."""

from moqa.methods import gptq, rtn
from moqa.methods.registry import METHODS, Job, Method, Result, method

__all__ = ["METHODS", "Job", "Method", "Result", "gptq", "method", "rtn"]
