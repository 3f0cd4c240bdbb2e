"""`--strategy auto`: a mixed plan where the samples tell that it is better, else one scheme for all units."""

from dataclasses import replace

import pytest
import torch

import moqa
from moqa.cli.plan import say_if_uniform
from moqa.planning.expected import jackknifed

INTEGERS = {"encodings": ("int",), "groups": (64,)}


def with_folds(profile, folds):
    """The profile whose sensitivities are the sums of some folds, made from what was measured."""
    statistics = {}
    for name, tables in profile.statistics.items():
        made = folds(tables["sensitivity"])
        statistics[name] = dict(tables) | {"folds": made, "sensitivity": made.sum(0)}
    return replace(profile, statistics=statistics)


def uncertain(table):
    """One fold alone says that some units matter more than others."""
    folds = torch.ones(4, *table.shape) * 4.0 ** -torch.arange(table.shape[1])
    folds[0, ::4] *= 10
    return folds


def test_takes_the_best_plan_where_folds_agree(sharded_profile):
    sure = with_folds(sharded_profile, lambda table: table[None].expand(4, -1, -1) / 4)
    found = moqa.plan(sure, "3bpw", **INTEGERS)
    assert (found.strategy, found.units) == ("budget", moqa.plan(sure, "3bpw", strategy="budget", **INTEGERS).units)
    assert found.gap is not None


def test_takes_one_scheme_where_they_do_not(sharded_profile, capsys):
    unsure = with_folds(sharded_profile, uncertain)
    budget = f"{moqa.plan(unsure, strategy='uniform', widths=(3,), groups=(64,)).account.bits_per_weight}bpw"
    assert len(set(moqa.plan(unsure, budget, strategy="budget", **INTEGERS).units.values())) > 1
    found = moqa.plan(unsure, budget, **INTEGERS)
    assert (found.strategy, {scheme.width for scheme in found.units.values()}, found.gap) == ("uniform", {3}, None)
    say_if_uniform("auto", found)
    say_if_uniform("uniform", found)
    assert capsys.readouterr().err.count("one scheme for all units") == 1


def test_the_one_scheme_is_the_best_of_all_encodings_and_groups(sharded_profile):
    unsure = with_folds(sharded_profile, uncertain)
    trellis = moqa.plan(unsure, strategy="uniform", widths=(2,), encodings=("trellis",), groups=(256,))
    found = moqa.plan(unsure, f"{trellis.account.bits_per_weight}bpw")
    assert found.strategy != "uniform" or found.units == trellis.units


def test_differences_between_distributions_are_no_chance():
    folds = [torch.full((3, 2, 1), value).numpy() for value in (1.0, 100.0)]
    gain = jackknifed(folds, lambda sums: 1 - sums[..., 0, 0] / (2 * sums[..., 1, 0]))
    assert (gain.low, gain.share, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    alone = jackknifed([fold[:1] for fold in folds], lambda sums: 1 - sums[..., 0, 0] / (2 * sums[..., 1, 0]))
    assert (alone.low, alone.share, alone.high) == (None, 0.5, None)
