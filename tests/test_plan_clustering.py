"""Fuzzy c-means on a line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moqa.planning.clustering import fuzzy_c_means
from moqa.planning.strategies.paper import border_pull, low_precision_first

values = arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1, allow_subnormal=False, width=32))


def textbook(values, clusters, fuzzifier=2.0, steps=1000):
    """Algorithm 1 of the paper, written with loops; starts from the same quantiles."""
    centres = [float(np.quantile(values, (k + 0.5) / clusters)) for k in range(clusters)]
    for _ in range(steps):
        membership = []
        for x in values:
            distance = [max(abs(x - c), 1e-12) for c in centres]
            membership.append([1 / sum((d / e) ** (2 / (fuzzifier - 1)) for e in distance) for d in distance])
        for k in range(clusters):
            weights = [m[k] ** fuzzifier for m in membership]
            centres[k] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    return np.array(centres), np.array(membership)


@given(values, st.integers(1, 5), st.sampled_from([1.3, 2.0, 3.0]))
def test_memberships_are_shares_and_centres_ascend(points, clusters, fuzzifier):
    centres, membership = fuzzy_c_means(points, clusters, fuzzifier)
    assert membership.shape == (len(points), clusters)
    assert np.allclose(membership.sum(1), 1)
    assert ((membership >= 0) & (membership <= 1)).all()
    assert (np.diff(centres) >= 0).all()
    assert centres.min() >= points.min() - 1e-9
    assert centres.max() <= points.max() + 1e-9


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_a_permutation_of_the_values_permutes_the_memberships(seed, clusters):
    generator = np.random.default_rng(seed)
    points, order = generator.random(30), generator.permutation(30)
    centres, membership = fuzzy_c_means(points, clusters)
    again, permuted = fuzzy_c_means(points[order], clusters)
    assert np.allclose(centres, again, atol=1e-6)
    assert np.allclose(membership[order], permuted, atol=1e-6)


@pytest.mark.parametrize("fuzzifier", [1.5, 2.0])
def test_is_the_textbook_algorithm(fuzzifier):
    points = np.array([0.01, 0.02, 0.05, 0.06, 0.09, 0.2, 0.22, 0.5])
    centres, membership = fuzzy_c_means(points, 3, fuzzifier, tolerance=1e-12)
    expected_centres, expected = textbook(points, 3, fuzzifier)
    assert np.allclose(centres, expected_centres, atol=1e-6)
    assert np.allclose(membership, expected, atol=1e-6)


def test_clear_clusters_are_found():
    points = np.concatenate([centre + np.linspace(-0.01, 0.01, 5) for centre in (0.1, 0.4, 0.7, 1.0)])
    centres, membership = fuzzy_c_means(points, 4)
    assert centres == pytest.approx([0.1, 0.4, 0.7, 1.0], abs=0.01)
    assert membership.argmax(1).tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert (membership.max(1) > 0.95).all()


@pytest.mark.parametrize("points", [[0.5], [0.5, 0.5, 0.5], [0.0] * 8, [0.1, 0.9]])
def test_degenerate_values(points):
    centres, membership = fuzzy_c_means(np.array(points), 4)
    assert np.isfinite(centres).all()
    assert np.allclose(membership.sum(1), 1)


class TestClasses:
    @pytest.mark.parametrize(
        ("membership", "expected"),
        [
            ([0.1, 0.2, 0.6, 0.1], 2),  # clear
            ([0.05, 0.45, 0.5, 0.0], 1),  # neighbours overlap: the lower
            ([0.5, 0.45, 0.05, 0.0], 0),
            ([0.5, 0.0, 0.45, 0.05], 0),  # no neighbours: the likeliest
            ([0.45, 0.0, 0.5, 0.05], 2),
            ([0.25, 0.25, 0.25, 0.25], 0),
        ],
    )
    def test_low_precision_first_in_overlaps(self, membership, expected):
        assert low_precision_first(np.array([membership])).tolist() == [expected]

    def test_border_pull_is_the_membership_next_door(self):
        membership = np.array([[0.6, 0.3, 0.1, 0.0], [0.0, 0.2, 0.3, 0.5], [0.1, 0.2, 0.6, 0.1]])
        assert border_pull(membership, np.array([0, 3, 2])).tolist() == [[0.0, 0.3], [0.3, 0.0], [0.2, 0.1]]
