"""`moqa compare-plans`: rankings, intervals, and what a strategy lacks."""

import json
from dataclasses import replace

import pytest
import torch

import moqa
from moqa.errors import MoqaError
from moqa.evaluation.measure import Reference, divergences
from moqa.format.reader import open_checkpoint
from moqa.models.view import open_model
from moqa.planning import STRATEGIES
from moqa.profiling.further import with_further
from moqa.profiling.swapped import swapped_divergence
from moqa.profiling.weights import outlier_scores, tail_exponent
from moqa.progress import quiet
from moqa.runtime.load import load_packed


def without(profile, *names):
    statistics = {
        text: {k: v for k, v in found.items() if k not in names} for text, found in profile.statistics.items()
    }
    return replace(profile, statistics=statistics, weights={k: v for k, v in profile.weights.items() if k not in names})


class TestRanking:
    def test_has_every_strategy_once_with_its_interval(self, tiny_profile):
        found = moqa.compare_plans(tiny_profile, "6bpw")
        assert sorted(row.strategy for row in found.plans) == sorted(STRATEGIES)
        expected = [row.expected for row in found.plans]
        assert expected == sorted(expected)
        assert found.plans[-1].expected > found.plans[0].expected
        assert found.without == {}
        # the gain is over a uniform plan of the same bytes: a strategy's rank does not depend on unused bytes
        uniform = next(row for row in found.plans if row.strategy == "uniform")
        assert abs(uniform.over_uniform.share) < 0.35

    def test_says_what_a_strategy_lacks_and_ranks_the_others(self, dense_profile):
        found = moqa.compare_plans(dense_profile, "5bpw")
        assert set(found.without) == {name for name, member in STRATEGIES.items() if member.needs_experts}
        assert "has none" in found.without["frequency"]

    @pytest.mark.parametrize(("strategy", "measured"), [
        (name, member.measures) for name, member in STRATEGIES.items() if member.measures
    ])  # fmt: skip
    def test_the_original_that_is_gone_is_one_clear_line(self, tiny_profile, strategy, measured):
        with pytest.raises(MoqaError, match=rf"--strategy {strategy} measures {measured[0]} of the original: .*tiny"):
            moqa.compare_plans(without(tiny_profile, *measured), "6bpw", strategies=[strategy])


class TestMeasured:
    def test_plans_that_are_equal_are_measured_once(self, sharded_profile, texts, monkeypatch):
        from moqa.evaluation import compare

        calls, quantize = [], compare.quantize
        monkeypatch.setattr(compare, "quantize", lambda *a, **o: calls.append(1) or quantize(*a, **o))
        found = moqa.compare_plans(
            sharded_profile, "4bpw", strategies=["uniform", "auto", "budget"], data=[texts["python"]], windows=4,
            method="rtn",
        )  # fmt: skip
        rows = {row.strategy: row.measured["python"] for row in found.plans}
        assert rows["uniform"].kl_divergence > 0
        assert rows["uniform"].windows == 4
        assert rows["uniform"].interval > 0
        assert len(calls) < 3 or rows["auto"] not in (rows["budget"], rows["uniform"])
        measured = [row.measured["python"].kl_divergence for row in found.plans]
        assert measured == sorted(measured)

    def test_a_text_that_the_profile_has_seen_is_refused(self, sharded_profile, texts):
        with pytest.raises(MoqaError, match="wiki"):
            moqa.compare_plans(sharded_profile, "4bpw", strategies=["uniform"], data=[texts["wiki"]], windows=2)


def test_the_divergence_of_windows_is_that_of_an_evaluation(sharded_plan, sharded_profile, texts, tmp_path):
    out = moqa.quantize(sharded_profile.original, sharded_plan, tmp_path / "out", profile=sharded_profile, method="rtn")
    whole = moqa.evaluate(out, [texts["python"]], against=sharded_profile.original, context=32, windows=5)
    view = open_model(sharded_profile.original)
    cut = view.task.cut(texts["python"], view.task.reader(view.folder), 32, 5)
    packed = load_packed(open_checkpoint(out), kernels="reference")
    found = divergences(packed, Reference.of(view.model, [cut], quiet), quiet)["python"]
    assert found.shape == (5,)
    assert float(found.mean()) == pytest.approx(whole.distributions["python"].kl_divergence, rel=1e-5)


class TestStatistics:
    def test_outliers_of_a_column(self, tiny_model):
        view = open_model(tiny_model)
        unit = view.block_units(0)[0]
        weight = torch.ones(unit.shape)
        weight[3, 5] = 9.0
        view.set_weight(unit, weight)
        assert outlier_scores(view, 0)[0] == pytest.approx(9 / (1 + 8 / unit.shape[0]))

    def test_a_heavier_tail_has_a_smaller_exponent(self):
        heavy, light = (torch.diag(torch.arange(1.0, 201.0) ** -power) for power in (2.0, 0.5))
        assert tail_exponent(heavy) < tail_exponent(light)

    def test_a_swapped_part_leaves_the_model_as_it_was(self, tiny_model):
        view = open_model(tiny_model)
        before = {name: view.weight(unit).clone() for name, unit in view.units.items()}
        rounding = torch.tensor([[4.0**-w for w in (1, 2, 3, 4, 8)]]).expand(len(before), -1)
        tokens = torch.randint(8192, (2, 24), generator=torch.Generator().manual_seed(0))
        scheme = moqa.profiling.record.Settings(context=24, samples=2).scheme(8)
        found = swapped_divergence(view, tokens, scheme, rounding, (1, 2, 3, 4, 8))
        assert all(torch.equal(view.weight(view.units[name]), weight) for name, weight in before.items())
        assert (found[:, 0] > found[:, 3]).all()
        assert (found >= 0).all()

    def test_are_measured_once(self, sharded_profile):
        more = with_further(sharded_profile, ["outliers", "similarity"], ["wiki"], "--strategy x")
        assert more.statistics["wiki"]["similarity"].shape == (2, 2)
        assert with_further(more, ["outliers", "similarity"], ["wiki"], "--strategy x") is more


def test_the_command_writes_the_ranking(sharded_profile, moqa_command, tmp_path):
    out = tmp_path / "ranking.json"
    code, stdout, _ = moqa_command(
        "compare-plans", sharded_profile.folder, "--bpw", 4, "--strategies", "uniform,frequency", "--json", out
    )
    assert code == 0
    assert "less than uniform by" in stdout
    assert len(json.loads(out.read_text())["plans"]) == 2
    code, _, stderr = moqa_command("compare-plans", sharded_profile.folder)
    assert (code, stderr) == (2, "moqa: no budget to compare plans at: give --bpw or --size\n")
    code, _, stderr = moqa_command("compare-plans", sharded_profile.folder, "--bpw", 4, "--strategies", "best")
    assert code == 2
    assert "--strategy best is unknown" in stderr
