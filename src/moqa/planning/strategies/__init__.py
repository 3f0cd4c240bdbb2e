"""The strategies, one file each: importing this package registers them."""

from moqa.planning.strategies import budgeted, frequency, moqa, moqa_v1, random, uniform

__all__ = ["budgeted", "frequency", "moqa", "moqa_v1", "random", "uniform"]
