"""`paper`: the base quantization of the paper, fuzzy c-means on the joint significance of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moqa.planning.clustering import fuzzy_c_means
from moqa.planning.registry import ALWAYS_USED, strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moqa.planning.problem import Choice, Problem

CLASSES = (2, 4, 6, 8)
OVERLAP = 0.25


@strategy("paper", needs_experts=True, options=("scope",), floor=ALWAYS_USED)
def paper(problem: Problem) -> Choice:
    """Experts in four classes of 2, 4, 6 and 8 bits by significance; an expert between two classes gets fewer bits.

    Fuzzy c-means does not control the size. With a budget, the experts nearest to the border of their class move to the
    next class until the bytes fit (our design; the paper has no budget). Units that are not experts take their smallest
    allowed width.

    MoQa (arXiv 2503.21135), equation 2 and algorithm 1.
    """
    experts = problem.routed_experts()
    significance = joint_significance(problem, list(experts))
    layers = np.array([layer for layer, _ in experts])
    classes, pull = np.zeros(len(experts), int), np.zeros((len(experts), 2))
    scopes = [layers == layer for layer in np.unique(layers)] if problem.options.scope == "layer" else [layers >= 0]
    for scope in scopes:
        _, membership = fuzzy_c_means(significance[scope], len(CLASSES))
        classes[scope] = low_precision_first(membership)
        pull[scope] = border_pull(membership, classes[scope])
    return fit_classes(problem, list(experts.values()), classes, pull)


def joint_significance(problem: Problem, experts: list[tuple[int, int]]) -> NDArray[np.float64]:
    """[experts] mean significance over the known distributions, the diagonal of their joint distribution."""
    per_layer = {
        layer: np.mean([problem.profile.significance(name, layer).double().numpy() for name in problem.known], axis=0)
        for layer in {layer for layer, _ in experts}
    }
    return np.array([per_layer[layer][expert] for layer, expert in experts])


def low_precision_first(membership: NDArray[np.float64]) -> NDArray[np.int64]:
    """Class of each value; if its two likeliest classes are neighbours and nearly equal, the lower of them."""
    order = np.argsort(-membership, axis=1, kind="stable")
    first, second = order[:, 0], order[:, 1]
    rows = np.arange(len(membership))
    overlap = (membership[rows, first] - membership[rows, second] < OVERLAP) & (np.abs(first - second) == 1)
    return np.where(overlap, np.minimum(first, second), first)


def border_pull(membership: NDArray[np.float64], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[values, 2] membership of each value in the class below and the class above its own."""
    rows = np.arange(len(membership))
    padded = np.pad(membership, ((0, 0), (1, 1)))
    return np.stack([padded[rows, classes], padded[rows, classes + 2]], axis=1)


def fit_classes(
    problem: Problem, experts: list[list[int]], classes: NDArray[np.int64], pull: NDArray[np.float64]
) -> Choice:
    """Widths of all groups for the experts' classes; with a budget, experts change class until it holds."""

    def widths_of(classes: NDArray[np.int64]) -> Choice:
        choice = problem.at_width(min(CLASSES))
        for rows, level in zip(experts, classes, strict=True):
            wanted = problem.at_width(CLASSES[level])
            # a group of several experts takes the widest width that one of them needs
            choice[rows] = np.maximum(choice[rows], wanted[rows])
        return choice

    classes, choice = classes.copy(), widths_of(classes)
    # lower one class per round, experts nearest to the border first
    while not problem.fits(choice) and classes.any():
        for index in np.argsort(-np.where(classes > 0, pull[:, 0], -1), kind="stable"):
            if classes[index] > 0:
                classes[index] -= 1
                choice = widths_of(classes)
                if problem.fits(choice):
                    break
    if problem.limit is None or not problem.fits(choice):
        return choice
    raised = True
    while raised:
        raised = False
        for index in np.argsort(-pull[:, 1], kind="stable"):
            if classes[index] < len(CLASSES) - 1:
                classes[index] += 1
                if problem.fits(wider := widths_of(classes)):
                    choice, raised = wider, True
                else:
                    classes[index] -= 1
    order = [row for index in np.argsort(-pull[:, 1], kind="stable") for row in experts[index]]
    # bytes that no expert can use go to the other units
    return problem.fill(problem.fill(choice, order), range(len(problem.groups)))
