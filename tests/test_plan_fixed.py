"""Units whose width the user chose: every strategy keeps it, and the budget."""

from fnmatch import fnmatchcase

import pytest

import moqa
from moqa.errors import MoqaError
from moqa.planning.registry import STRATEGIES

FIXED = {"*.layers.1.*": 5, "*.layers.0.mlp.experts.*.down_proj": 16}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_them_and_the_budget(tiny_profile, strategy):
    made = moqa.plan(tiny_profile, "7bpw", strategy=strategy, widths=(2, 3, 8), fixed=FIXED)
    assert made.account.bits_per_weight <= 7
    for name, scheme in made.units.items():
        chosen = [width for pattern, width in FIXED.items() if fnmatchcase(name, pattern)]
        if chosen:
            assert scheme.width == chosen[-1]
        else:
            assert scheme.width in (2, 3, 8)
    assert made.fixed == FIXED


def test_the_rest_gets_what_they_leave(tiny_profile):
    plain = moqa.plan(tiny_profile, "6bpw")
    made = moqa.plan(tiny_profile, "6bpw", fixed={"*.experts.0.*": 8})
    others = [name for name in made.units if ".experts.0." not in name]
    assert sum(made.units[n].width for n in others) < sum(plain.units[n].width for n in others)
    assert 5.9 < made.account.bits_per_weight <= 6


def test_the_last_pattern_counts(tiny_profile):
    made = moqa.plan(tiny_profile, strategy="uniform", fixed={"*": 3, "*.layers.0.*": 4})
    assert {made.units[name].width for name in made.units if ".layers.0." in name} == {4}
    assert {made.units[name].width for name in made.units if ".layers.0." not in name} == {3}


def test_plans_without_them_say_nothing_of_it(tiny_profile):
    assert "fixed" not in moqa.plan(tiny_profile, "6bpw").model_dump()


@pytest.mark.parametrize(
    ("fixed", "ties", "problem"),
    [
        (
            {"*.layer.0.*": 4},
            "unit",
            r"--set \*.layer.0.\*=4 matches no unit: they have names like model.layers.0.self",
        ),
        ({"*.layers.9.*": 16}, "unit", r"--ignore \*.layers.9.\* matches no unit"),
        ({"*": 12}, "unit", r"--set \*=12 cannot be planned: this profile has 1, 2, 3, 4, 5, 6, 7, 8, 16"),
        ({"*.down_proj": 4}, "expert", "give .*down_proj 4 bits, but not .*gate_proj: --ties makes them share a width"),
    ],
)
def test_refuses(tiny_profile, fixed, ties, problem):
    with pytest.raises(MoqaError, match=problem):
        moqa.plan(tiny_profile, "4bpw", ties=ties, fixed=fixed)


def test_a_budget_below_them_is_refused_with_what_can_be_reached(tiny_profile):
    with pytest.raises(
        MoqaError, match=r"is below the smallest plan of this profile: reachable .*: 11.19 to 11.19 bpw"
    ):
        moqa.plan(tiny_profile, "4bpw", fixed={"*": 8})
