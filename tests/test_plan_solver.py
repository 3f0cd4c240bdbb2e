"""The knapsack against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.planning.solver import solve


@st.composite
def problems(draw):
    """[objectives, groups, choices] costs, sizes and a limit that at least one choice of all groups meets."""
    objectives, groups, choices = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    costs = generator.exponential(size=(objectives, groups, choices)) ** draw(st.sampled_from([1, 3]))
    if draw(st.booleans()):
        costs = np.round(costs)  # ties and zeros
    scale = draw(st.sampled_from([1, 1000, 10**9]))
    sizes = generator.integers(1, 20, (groups, choices)) * scale + generator.integers(0, 2, (groups, choices))
    forbidden = generator.random((groups, choices)) < draw(st.sampled_from([0, 0.3]))
    forbidden[np.arange(groups), generator.integers(0, choices, groups)] = False
    costs[:, forbidden] = np.inf
    allowed = np.where(forbidden, np.iinfo(np.int64).max, sizes)
    largest = np.where(forbidden, 0, sizes).max(1).sum()
    smallest = allowed.min(1).sum()
    limit = smallest + int((largest - smallest) * draw(st.floats(0, 1.1)))
    return costs, sizes, int(limit)


def value(costs, choice):
    """What is minimised: the largest sum, and a little of their mean."""
    scale = np.where(np.isfinite(costs), costs, 0).max(2).sum(1).mean()
    sums = costs[:, np.arange(len(choice)), choice].sum(1) / max(scale, 1e-300)
    return sums.max() + 1e-3 * sums.mean()


def size(sizes, choice):
    return int(sizes[np.arange(len(choice)), choice].sum())


def brute_force(costs, sizes, limit):
    choices = itertools.product(range(costs.shape[2]), repeat=costs.shape[1])
    return min(value(costs, c) for c in map(np.array, choices) if size(sizes, c) <= limit)


@settings(max_examples=150)
@given(problems())
def test_is_as_good_as_brute_force_and_within_the_limit(problem):
    costs, sizes, limit = problem
    choice = solve(costs, sizes, limit).choice
    assert size(sizes, choice) <= limit
    assert np.isfinite(costs[:, np.arange(len(choice)), choice]).all()
    assert value(costs, choice) <= brute_force(costs, sizes, limit) + 1e-6


@pytest.mark.parametrize("unit", [1, 10**6, 10**9, 10**12])
def test_not_one_byte_above_the_limit(unit):
    # both at the wide choice would be best and is one byte too large
    costs = np.array([[[9.0, 1.0], [9.0, 1.1]]])
    sizes = np.array([[unit, 3 * unit], [unit, 3 * unit + 1]])
    assert solve(costs, sizes, 6 * unit).choice.tolist() == [1, 0]
    assert solve(costs, sizes, 6 * unit + 1).choice.tolist() == [1, 1]


@pytest.mark.parametrize("limit", [-5, 0, 3])
def test_an_infeasible_limit_is_an_error(limit):
    with pytest.raises(ValueError, match=f"exceed {limit} bytes"):
        solve(np.ones((1, 2, 2)), np.array([[2, 4], [2, 4]]), limit)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_without_any_allowed_choice_is_an_error(groups):
    with pytest.raises(ValueError, match="exceed"):
        solve(np.full((1, groups, 2), np.inf), np.ones((groups, 2), np.int64), 100)


def test_a_choice_forbidden_in_one_objective_is_never_taken():
    costs = np.array([[[1.0, 0.0]], [[1.0, np.inf]]])
    assert solve(costs, np.array([[5, 1]]), 10).choice.tolist() == [0]


def test_of_equal_choices_the_first_is_taken():
    assert solve(np.zeros((1, 3, 4)), np.full((3, 4), 7), 21).choice.tolist() == [0, 0, 0]


def test_a_larger_choice_that_is_no_better_is_never_taken():
    costs = np.array([[[1.0, 1.0, 0.5], [2.0, 3.0, 2.0]]])
    assert solve(costs, np.array([[1, 2, 9], [1, 2, 3]]), 100).choice.tolist() == [2, 0]


def test_several_objectives_protect_the_worst():
    # one wide choice is affordable: the mean wants the first group, the worst sum the second
    costs = np.array([[[9.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [10.0, 0.0]]])
    sizes = np.array([[1, 2], [1, 2]])
    assert solve(costs, sizes, 3).choice.tolist() == [0, 1]
    assert solve(costs, sizes, 4).choice.tolist() == [1, 1]


def test_errors_far_apart_still_count():
    costs = np.array([[[1e6, 0.0], [1e-6, 0.0], [3e-6, 0.0]]])
    assert solve(costs, np.array([[1, 2]] * 3), 5).choice.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("groups", "objectives", "gap"), [(1000, 1, 1e-4), (1000, 3, 1e-3), (20_000, 1, 1e-4)])
def test_large_problems_come_with_a_proof_of_how_good_they_are(groups, objectives, gap):
    generator = np.random.default_rng(groups)
    weights = generator.choice([110_592, 331_776, 884_736], size=groups)
    widths = np.array([2, 3, 4, 5, 6, 8])
    costs = (
        generator.lognormal(0, 1.5, (groups, 1)) * generator.lognormal(0, 0.3, (objectives, groups, 1)) * 4.0**-widths
    )
    sizes = (weights[:, None] * (widths + 0.375) / 8).astype(np.int64)
    limit = int(weights.sum() * 3.5 / 8)
    solution = solve(costs, sizes, limit)
    assert size(sizes, solution.choice) <= limit
    assert solution.gap <= gap
    # the proof holds: with any weights of the objectives, any price of a byte gives a lower bound on the best value
    best = costs[:, np.arange(groups), solution.choice].sum(1)
    worth = costs.mean(0)
    bound = max((worth + p * sizes).min(1).sum() - p * limit for p in np.geomspace(1e-12, 1e-3, 200))
    assert best.max() + 1e-3 * best.mean() >= bound * (1 - 1e-9)
    if objectives == 1:
        assert best.sum() <= bound * (1 + gap) * 1.005


def test_hundreds_of_groups_are_solved_to_the_bound():
    generator = np.random.default_rng(0)
    costs = np.sort(generator.exponential(size=(1, 400, 6)), axis=2)[:, :, ::-1]
    sizes = np.arange(2, 8) * generator.integers(100, 10_000, (400, 1))
    limit = int(sizes[:, 1].sum())
    choice = solve(costs, sizes, limit).choice
    assert size(sizes, choice) <= limit
    # any multiplier gives a lower bound on the best sum
    bound = max((costs[0] + price * sizes).min(1).sum() - price * limit for price in np.geomspace(1e-8, 1e-2, 400))
    assert costs[0, np.arange(400), choice].sum() <= bound * 1.005 + 1e-9
