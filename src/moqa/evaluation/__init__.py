"""Evaluation: perplexity and divergence from the original, on data that no fit has seen."""

from moqa.evaluation.measure import Quality, Reference
from moqa.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Quality", "Reference", "evaluate"]
