"""The tables of a problem against plain sums over the units of each group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moqa.errors import MoqaError
from moqa.format.layout import unit_bytes
from moqa.format.scheme import Scheme
from moqa.planning import TIES, Budget, Options
from moqa.planning.candidates import candidates
from moqa.planning.problem import make_problem, summed
from moqa.planning.ties import tie_groups
from moqa.profiling import UnitRecord
from moqa.profiling.record import ProfileRecord


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_sums_are_those_of_each_group_to_the_last_bit(experts, seed):
    units = [
        UnitRecord(name=str(row), layer=0, role="expert", projection="up_proj", expert=expert, shape=(32, 32))
        for row, expert in enumerate(experts)
    ]
    rows = np.random.default_rng(seed).lognormal(0, 9, (len(units), 5))
    for ties in TIES:
        groups = tie_groups(units, ties)
        assert np.array_equal(summed(groups, rows), [rows[list(group.members)].sum(0) for group in groups])


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("budget", [Budget.parse(bpw=4), Budget.parse(size="60KiB")])
def test_sizes_are_the_bytes_of_all_units_of_a_group(tiny_profile, ties, budget):
    groups = tie_groups(tiny_profile.record.units, ties)
    schemes = candidates((1, 2, 3, 8, 16), ("int", "trellis"), (64, 128), symmetric=False, mixed=True)
    problem = make_problem(
        tiny_profile, ("wiki",), groups=groups, schemes=schemes, widths=(1, 2, 3, 8, 16), floors={}, fixed={},
        budget=budget, options=Options(), fixed_bytes=0,
    )  # fmt: skip
    for group, sizes in zip(groups, problem.sizes.tolist(), strict=True):
        if budget.counts == "units":
            assert sizes == [sum(s.stored_bytes(u.shape) for u in group.units) for s in schemes]
        else:  # with their entries in the headers of the files
            assert sizes == [sum(unit_bytes(u.name, u.shape, s) for u in group.units) for s in schemes]


def test_a_scheme_whose_errors_were_not_measured_is_named(sharded_profile):
    lacking = Scheme(width=2, group_size=512, encoding="trellis")
    with pytest.raises(MoqaError, match=r"has no errors of trellis of 2 bits in groups of 512: profile again"):
        sharded_profile.compared(lacking)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": 2**40}, "layers\n.*less than"),
        ({"settings": {"context": 8, "samples": 1, "group_size": 48}}, "group_size\n.*multiple of 32"),
        ({"settings": {"context": 8, "samples": 1, "symmetric": True}}, "width 1 cannot be symmetric"),
    ],
)
def test_a_profile_that_no_model_has_is_refused(sharded_profile, change, match):
    record = sharded_profile.record.model_dump()
    assert ProfileRecord.model_validate(record) == sharded_profile.record
    with pytest.raises(ValueError, match=match):
        ProfileRecord.model_validate(record | change)
