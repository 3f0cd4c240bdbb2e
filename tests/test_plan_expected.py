"""What a plan is expected to gain over a uniform one of the same bytes."""

import re
from dataclasses import replace

import pytest
import torch

import moqa
from moqa.cli.plan import print_plan
from moqa.planning.expected import expected_gains
from moqa.planning.record import Gain
from moqa.storage.artifact import write_json


def with_folds(profile, folds):
    """The profile whose folds are made from its sensitivity; None removes them."""
    statistics = {}
    for name, tables in profile.statistics.items():
        others = {key: value for key, value in tables.items() if key != "folds"}
        statistics[name] = others if folds is None else others | {"folds": folds(tables["sensitivity"])}
    return replace(profile, statistics=statistics)


def test_a_uniform_plan_gains_nothing(sharded_profile):
    plan = moqa.plan(sharded_profile, strategy="uniform", widths=(3,))
    assert plan.gains.keys() == plan.predicted.keys()
    for gain in plan.gains.values():
        assert gain.share == pytest.approx(0, abs=1e-6)


def test_the_gain_is_that_of_the_predictions(sharded_profile):
    budget = f"{moqa.plan(sharded_profile, strategy='uniform', widths=(3,)).account.bits_per_weight}bpw"
    plan, uniform = moqa.plan(sharded_profile, budget), moqa.plan(sharded_profile, strategy="uniform", widths=(3,))
    # a plan may leave a few bytes of its budget
    assert plan.account.units == pytest.approx(uniform.account.units, rel=1e-3)
    for name, gain in plan.gains.items():
        assert gain.share == pytest.approx(1 - plan.predicted[name] / uniform.predicted[name], abs=0.01)
        assert gain.share > 0.1


def test_the_interval_is_as_wide_as_folds_differ(sharded_profile):
    plan = moqa.plan(sharded_profile, "2.6bpw")
    found = sharded_profile.folds("wiki")
    assert torch.allclose(found.sum(0), sharded_profile.sensitivity("wiki"), rtol=0.2)

    def gain(folds):
        return expected_gains(with_folds(sharded_profile, folds), plan.units, ["wiki"])["wiki"]

    alike, none = gain(lambda whole: torch.stack([whole / 4] * 4)), gain(None)
    assert (alike.low, alike.high) == pytest.approx((alike.share, alike.share))
    assert (none.low, none.high, str(none)) == (None, None, f"{100 * none.share:.0f} %")

    def differing(by):
        tilt = torch.linspace(1 - by, 1 + by, len(sharded_profile.record.units))[:, None]
        return lambda whole: torch.stack([whole * tilt / 4, whole * (2 - tilt) / 4] * 2)

    little, much = gain(differing(0.1)), gain(differing(0.5))
    assert little.share == pytest.approx(alike.share)
    assert little.low < alike.share < little.high
    assert much.high - much.low > 3 * (little.high - little.low)
    assert f"({100 * much.low:.0f} to {100 * much.high:.0f})" in str(much)


def test_none_beyond_all_uniform_plans(sharded_profile):
    assert moqa.plan(sharded_profile, strategy="uniform", fixed={"*": 16}).gains == {}


def test_the_command_says_it(moqa_command, sharded_profile, tmp_path):
    code, out, err = moqa_command("plan", sharded_profile.folder, "--bpw", "3", "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    assert "less than uniform by" in out


def test_a_gain_that_is_not_sure_is_a_warning(capsys, sharded_profile):
    plan = moqa.plan(sharded_profile, "3bpw")
    gains = {"wiki": Gain(share=0.1, low=-0.2, high=0.4), "self": Gain(share=0.1, low=0.05, high=0.15)}
    print_plan(plan.model_copy(update={"gains": gains}))
    captured = capsys.readouterr()
    assert "10 % (-20 to 40)" in captured.out
    assert captured.err == "moqa: warning: a uniform plan may do as well on wiki\n"


def test_a_report_has_it(sharded_profile, tmp_path):
    gains = {"wiki": Gain(share=0.4, low=0.35, high=0.452), "self": Gain(share=-0.1, low=None, high=None)}
    made = moqa.plan(sharded_profile, strategy="uniform", widths=(3,))
    found = []
    for name, some in (("without", {}), ("with", gains)):
        write_json(made.model_copy(update={"gains": some}), tmp_path / name / "plan.json")
        text = moqa.report([tmp_path / name], tmp_path / "report.html").read_text(encoding="utf-8").replace("\xa0", " ")
        _, titled, rest = text.partition("Expected gain over uniform")
        found.append(re.findall(r"<t[hd][^>]*>([^<]+)", rest.partition("</table>")[0]) if titled else None)
    assert found[0] is None
    heads, cells = found[1][:3], found[1][4:]
    assert (heads, cells) == (["Plan", "wiki", "self"], ["40 % (35 to 45)", "\u221210 %"])
