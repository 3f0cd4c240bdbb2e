"""Reduction: fewer experts per block, as a plain model that quantizes on."""

from moqa.reduction.registry import REDUCTIONS, Routed, reduction
from moqa.reduction.run import reduce

__all__ = ["REDUCTIONS", "Routed", "reduce", "reduction"]
