"""`paper-v1`: first version of the paper, two groups of experts split by a threshold on re-weighted significance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.placement import filled, neighbours, raised
from moqa.planning.registry import ALWAYS_USED, strategy
from moqa.planning.strategies.paper import joint_significance

if TYPE_CHECKING:
    from moqa.planning.problem import Choice, Problem

REWEIGHT = 0.3


@strategy("paper-v1", needs_sensitivity=False, needs_experts=True, floor=ALWAYS_USED)
def paper_v1(problem: Problem) -> Choice:
    """Experts above a threshold get the higher of two widths, experts below it the lower.

    The significance of an expert is lowered if its weights resemble those of another: S (1 - a * largest similarity),
    a = 0.3. With a budget, the two widths are those of the uniform plans just below and above it, and experts get the
    higher one in order of significance until the bytes are used. Without one, the threshold is the mean significance of
    the layer, and the widths are 2 and 4.

    MoQa v1 (arXiv 2503.21135v1): threshold T and re-weighting factor a are the paper's, their values and the form of
    the re-weighting are ours.
    """
    experts = problem.routed_experts()
    significance = joint_significance(problem, list(experts))
    for index, (layer, expert) in enumerate(experts):
        similarity = problem.profile.weights[f"layer.{layer}.similarity"][expert].clone()
        similarity[expert] = -1.0
        significance[index] *= 1 - REWEIGHT * max(float(similarity.max()), 0.0)
    order = np.argsort(-significance, kind="stable")
    if problem.limit is None:
        layers = np.array([layer for layer, _ in experts])
        mean = np.array([significance[layers == layer].mean() for layer in layers])
        low, high, chosen = problem.at_width(2), problem.at_width(4), order[(significance >= mean)[order]]
    else:
        low, high = neighbours(problem)
        chosen = order
    rows = list(experts.values())
    choice = raised(problem, low, high, [rows[index] for index in chosen])
    return filled(problem, choice, [rows[index] for index in order])
