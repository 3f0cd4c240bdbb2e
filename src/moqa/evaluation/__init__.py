"""Evaluation: perplexity, divergence from the original, on text that no fit has seen."""

from moqa.evaluation.measure import Quality, Reference
from moqa.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Quality", "Reference", "evaluate"]
