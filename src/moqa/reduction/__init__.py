"""Reduction: fewer experts per block, as a plain model that quantizes on."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.reduction.registry import REDUCTIONS, Routed, reduction
    from moqa.reduction.run import reduce
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["REDUCTIONS", "Routed", "reduce", "reduction"]
