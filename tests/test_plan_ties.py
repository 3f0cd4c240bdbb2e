"""Ties: every unit in exactly one group, together with whom an engine ties it to."""

import pytest

from moqa.planning import TIES
from moqa.planning.ties import tie_groups

# 3 layers of 3 attention units, 8 experts and a shared expert of 3 units each
SIZES = {
    "unit": [1] * 3 * (3 + 24 + 3),
    "expert": ([1] * 3 + [3] * 8 + [3]) * 3,
    "layer_projection": ([1] * 3 + [8] * 3 + [1] * 3) * 3,
    "layer": [3, 24, 3] * 3,
}


@pytest.mark.parametrize("ties", TIES)
def test_groups_partition_the_units(tiny_profile, ties):
    units = tiny_profile.record.units
    groups = tie_groups(units, ties)
    assert sorted(row for group in groups for row in group.members) == list(range(len(units)))
    assert all(group.units == tuple(units[row] for row in group.members) for group in groups)
    assert sum(unit.weights for group in groups for unit in group.units) == sum(unit.weights for unit in units)
    assert [len(group.members) for group in groups] == SIZES[ties]


@pytest.mark.parametrize(
    ("ties", "shared"),
    [
        ("unit", ("name",)),
        ("expert", ("layer", "role", "expert")),
        ("layer_projection", ("layer", "role", "projection")),
        ("layer", ("layer", "role")),
    ],
)
def test_members_share_what_the_engine_ties(tiny_profile, ties, shared):
    groups = tie_groups(tiny_profile.record.units, ties)
    for group in groups:
        assert all(len({getattr(unit, field) for unit in group.units}) == 1 for field in shared)
    experts = [tuple(getattr(g.units[0], f) for f in shared) for g in groups if g.units[0].role == "expert"]
    assert len(set(experts)) == len(experts)


def test_a_dense_model_has_groups_too(dense_profile):
    units = dense_profile.record.units
    assert [len(tie_groups(units, ties)) for ties in TIES] == [18, 18, 18, 6]
