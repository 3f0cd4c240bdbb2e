"""Plans of all strategies at one budget, ranked by the divergence that the samples let expect."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from moqa.errors import MoqaError
from moqa.planning.budget import Budget
from moqa.planning.expected import jackknifed, over_uniform, used_folds
from moqa.planning.record import Gain, Plan
from moqa.planning.registry import PLAIN, STRATEGIES
from moqa.planning.run import plan
from moqa.profiling import Profile


def plans_of_all(
    profile: Profile, budget: Budget | str, strategies: Iterable[str] | None = None, **options: Any
) -> tuple[dict[str, Plan], dict[str, str]]:
    """A plan of every strategy at one budget, and the reason where there is none.

    >>> plans, without = plans_of_all(profile, "4bpw", ["uniform", "budget", "frequency"])
    >>> sorted(plans), without
    (['budget', 'frequency', 'uniform'], {})

    Args:
        profile: statistics of the model.
        budget: of all plans.
        strategies: names; None means all, and those that lack something they need are only reported.
        options: of `moqa.plan`; those that a strategy does not take are refused for strategies that were named.

    Raises:
        MoqaError: if a named strategy has no plan, or none has.
    """
    plans, without = {}, {}
    for name in STRATEGIES if strategies is None else dict.fromkeys(strategies):
        try:
            plans[name] = plan(profile, budget, strategy=name, **options)
        except MoqaError as error:
            if strategies is not None:
                raise
            without[name] = str(error)
    if not plans:
        raise MoqaError("no strategy has a plan", next(iter(without.values())))
    return plans, without


def known_gain(profile: Profile, made: Plan) -> Gain | None:
    """Share that a plan saves of the divergence of a uniform plan of its bytes, on its known distributions together.

    >>> known_gain(profile, plan(profile, "4bpw", strategy="budget")).share > 0
    True
    """
    folds = [used_folds(profile, name) for name in made.known] if made.predicted else []
    share = over_uniform(profile, made.units)
    return jackknifed(folds, share) if share is not None and all(map(len, folds)) and folds else None


def ranked(plans: dict[str, Plan]) -> list[str]:
    """Names of plans, those with the least expected divergence on the known distributions first."""
    expected = {
        name: float(np.mean([made.predicted[text] for text in made.known])) if made.predicted else np.inf
        for name, made in plans.items()
    }
    return sorted(plans, key=lambda name: (expected[name], name != PLAIN, name))
