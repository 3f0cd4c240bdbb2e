"""Budgets as users type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moqa.errors import MoqaError
from moqa.planning import Budget


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("12MiB", 12 * 2**20), ("12 MiB", 12 * 2**20), (" 12mib ", 12 * 2**20), ("3.5GB", 3_500_000_000),
        ("1KB", 1000), ("1KiB", 1024), ("0.5GiB", 2**29), ("2TB", 2 * 10**12), ("1TiB", 2**40), ("123456", 123456),
        (123456, 123456), ("7B", 7), ("1.9B", 1), ("0.1KB", 100),
    ],
)  # fmt: skip
def test_sizes(typed, expected):
    budget = Budget.parse(size=typed)
    assert (budget.bytes, budget.counts, budget.limit(10**9)) == (expected, "checkpoint", expected)
    assert budget.typed == f"--size {typed}"


@pytest.mark.parametrize(
    "typed", ["", "MiB", "12 parsecs", "-1MB", "1,5MB", "1.MB", "1e6", "12M B", "0x10", "nan", "12MiB 3", "9" * 400]
)
def test_what_is_no_size(typed):
    with pytest.raises(MoqaError, match="is not a size"):
        Budget.parse(size=typed)


@pytest.mark.parametrize("bpw", [0, -1, 64, 1e9, float("nan"), float("inf")])
def test_what_is_no_number_of_bits(bpw):
    with pytest.raises(MoqaError, match="is not a number of bits"):
        Budget.parse(bpw=bpw)


def test_two_budgets_are_one_too_many():
    with pytest.raises(MoqaError, match="are two budgets"):
        Budget.parse(bpw=3, size="1MB")


def test_none_is_none():
    assert Budget.parse() is None


@pytest.mark.parametrize(("bpw", "weights", "limit"), [(2.5, 1600, 500), (3, 100, 37), (2.999, 8, 2), (16, 10, 20)])
def test_bits_are_of_the_units(bpw, weights, limit):
    budget = Budget.parse(bpw=bpw)
    assert (budget.counts, budget.limit(weights)) == ("units", limit)


@given(st.integers(1, 10**13), st.data())
def test_the_bits_of_a_plan_are_a_budget_that_holds_just_that_plan(weights, data):
    size = data.draw(st.integers(max(1, weights // 100), weights * 2))
    limit = Budget.parse(bpw=size * 8 / weights).limit(weights)
    # above 2^52 several byte counts have the same bits per weight as a float
    assert limit * 8 / weights == size * 8 / weights
    assert limit == size or weights > 2**44


@given(st.integers(1, 10**13), st.floats(0.01, 63.9))
def test_the_limit_is_the_most_bytes_within_the_bits(weights, bpw):
    limit = Budget.parse(bpw=bpw).limit(weights)
    assert limit * 8 / weights <= bpw < (limit + 1) * 8 / weights
