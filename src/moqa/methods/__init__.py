"""Quantization methods: from weights and what they are multiplied with to what is stored. One file per method."""

from moqa.methods import gptq, rtn
from moqa.methods.registry import METHODS, GridResult, Method, SolveBatch, SolveResult, method

__all__ = ["METHODS", "GridResult", "Method", "SolveBatch", "SolveResult", "gptq", "method", "rtn"]
