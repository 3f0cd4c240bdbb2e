"""Evaluation: perplexity, divergence from the original, on text that no fit has seen."""

from moqa.callable import callable_folder
from moqa.evaluate.measure import Reference, Score
from moqa.evaluate.run import Evaluation, Quality, evaluate

__all__ = ["Evaluation", "Quality", "Reference", "Score", "evaluate"]

callable_folder(__name__, evaluate)
