"""Evaluation: perplexity, divergence from the original, on text that no fit has seen."""

from moqa.callable import callable_folder
from moqa.evaluate.measure import Quality, Reference
from moqa.evaluate.run import Evaluation, evaluate

__all__ = ["Evaluation", "Quality", "Reference", "evaluate"]

callable_folder(__name__, evaluate)
