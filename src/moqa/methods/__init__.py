"""Quantization methods: from weights and statistics of their inputs to what is stored. One file per method."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.methods.registry import METHODS, Method, SolveBatch, method
    from moqa.methods.result import GridResult, SolveResult
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["METHODS", "GridResult", "Method", "SolveBatch", "SolveResult", "method"]
