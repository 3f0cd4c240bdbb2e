"""Optimizers of trainings, one file per member."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.training.optimizers.registry import DEFAULT_OPTIMIZER, OPTIMIZERS, OptimizerRule
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["DEFAULT_OPTIMIZER", "OPTIMIZERS", "OptimizerRule"]
