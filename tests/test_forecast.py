"""Forecasts of time: arithmetic on made-up rates, and a trial that does every piece of the work."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from conftest import REFERENCE
from families import random_model, save, train_tokenizer

from moqa.estimate import Trial
from moqa.evaluation.proof import baselines
from moqa.forecast.rates import BlockRates, Rates, TokenCost, block_kinds
from moqa.forecast.time import comparison_seconds, loading_seconds, profile_seconds, quantization_seconds
from moqa.forecast.trial import Stopwatch
from moqa.methods import METHODS, Method, SolveBatch
from moqa.models.view import open_model
from moqa.planning import plan
from moqa.profiling import SELF, profile
from moqa.profiling.blank import blank_profile
from moqa.quantization.trial import trial_batches

BLOCK = BlockRates(
    experts=8,
    bytes=1000, read=0.5, read_work=0.4, written=100, write=1.0, write_work=0.2,
    inputs=TokenCost(0.0, 0.01), calls=TokenCost(0.0, 0.001), expert=TokenCost(0.5, 0.002), linear=3.0, solve=4.0,
    advance=TokenCost(1.0, 0.02),
    weights=7.0, forward=TokenCost(1.0, 0.01), back=TokenCost(2.0, 0.02), back_slice=TokenCost(0.0, 0.03),
    back_expert=TokenCost(3.0, 0.04), step=0.5,
    original=TokenCost(0.0, 0.01), packed=TokenCost(2.0, 0.02),
)  # fmt: skip
RATES = Rates(
    (0, 0), {0: BLOCK}, 10_000.0, 2, ends=6.0, embed=TokenCost(0.0, 0.1), labels=TokenCost(0.0, 0.05), step=0.25,
    score=TokenCost(0.0, 0.1), checkpoint=9.0,
)  # fmt: skip


class TestTokenCost:
    def test_lies_on_two_measurements(self):
        cost = TokenCost.through((100, 1.5), (300, 3.5))
        assert (cost.of(100), cost.of(300), cost.of(200)) == pytest.approx((1.5, 3.5, 2.5))

    @pytest.mark.parametrize("few", [(100, 9.0), (100, 0.1), (200, 2.0)], ids=["falling", "steep", "equal"])
    def test_noise_makes_no_part_negative(self, few):
        assert TokenCost.through(few, (200, 2.0)) == TokenCost(0.0, 0.01)


class TestSeconds:
    def test_quantization_adds_up_what_every_layer_takes(self):
        # read, solved, inputs, calls of two slices, statistics, written; the last layer moves nothing on
        layer = 0.5 + (3 + 8 * 4) + 100 * 0.01 + 2 * 100 * 0.001 + 8 * (0.5 + 100 * 0.002) + 1.0
        expected = 2 * layer + (1 + 100 * 0.02) + 6 + 100 * 0.1 + 50 * 0.01
        assert quantization_seconds(RATES, 100, 50, 4) == pytest.approx(expected)

    def test_a_method_without_data_runs_no_layer(self):
        assert quantization_seconds(RATES, 0, 0, 8) == pytest.approx(2 * (0.5 + 35 + 1.0) + 6)

    def test_storage_and_work_beside_each_other_take_as_long_as_the_slower(self):
        assert quantization_seconds(RATES, 0, 0, 8, ahead=True) == pytest.approx(2 * (35 + 0.3) + 6)
        slow = replace(RATES, storage=10.0)
        assert quantization_seconds(slow, 0, 0, 8, ahead=True) == pytest.approx(2 * (100 + 1.0) + 6)

    def test_a_model_in_memory_is_read_once(self):
        assert loading_seconds(RATES) == pytest.approx(6 + 2 * 0.5)
        less = quantization_seconds(RATES, 0, 0, 8) - quantization_seconds(RATES.loaded(), 0, 0, 8)
        assert less == pytest.approx(loading_seconds(RATES))

    def test_a_profile_goes_forward_back_and_writes(self):
        layer = 0.5 + 7 + 3 * (0.5 + 0.5) + 2 * 2.0 + 0.5 + 2 * (4.0 + 3.0) + 2 * 8 * 7.0
        expected = 200 * 0.1 + 2 * layer + (6 + 200 * 0.05) + 6 + 3 * (6 + 0.25)
        assert profile_seconds(RATES, [100, 100], [100, 100], 3, 4) == pytest.approx(expected)

    def test_of_many_samples_few_go_back(self):
        more = profile_seconds(RATES, [400], [100], 0, 8) - profile_seconds(RATES, [100], [100], 0, 8)
        assert more == pytest.approx(300 * (0.1 + 2 * BLOCK.forward.token))

    def test_without_sensitivity_nothing_goes_back(self):
        found = profile_seconds(RATES.loaded(), [100], [100], 0, 4, sensitivity=False)
        assert found == pytest.approx(100 * 0.1 + 2 * (7 + 2.0))

    def test_a_comparison_runs_the_original_once(self):
        original, each = 6 + 2 * (0.5 + 1.0), 9 + 100 * 0.1 + 2 * 4.0
        assert comparison_seconds(RATES, 100, 4) == pytest.approx(original + 4 * each)


class TestStopwatch:
    def test_a_first_time_that_takes_longer_counts_once(self):
        marks = iter([0, 0.5, 1, 1.1, 2, 2.1])
        watch = Stopwatch(lambda: next(marks), lambda: 0.0)
        assert watch.seconds(lambda: None) == pytest.approx(0.1)
        assert watch.once == pytest.approx(0.4)

    def test_long_work_is_done_once(self):
        done, seconds = [], count(step=5)
        assert Stopwatch(lambda: next(seconds), lambda: 0.0).seconds(lambda: done.append(1)) == 5
        assert done == [1]


def test_a_trial_stands_for_the_samples_of_a_run():
    assert trial_batches(windows=64, together=4) == (3, 2, 4)
    assert trial_batches(windows=16, together=4) == (3, 1, 2)
    assert trial_batches(windows=1, together=1) == (1, 1, 1)


@pytest.fixture(scope="module", params=["llama", "deepseek_v2", "qwen3_next"])
def mixed(request, texts, tmp_path_factory):
    """A family, its profile, and a plan: dense, two kinds of layers, and layers of two kinds of attention."""
    folder = save(
        random_model(request.param),
        train_tokenizer(sorted((REFERENCE / "text").glob("*.calib.txt"))),
        tmp_path_factory.mktemp("model"),
    )
    out = tmp_path_factory.mktemp("profile") / "out"
    measured = profile(folder, [texts["wiki"]], out, samples=6, context=32, self_samples=2)
    return folder, measured, plan(measured, strategy="uniform", widths=(3,))


class TestTrial:
    def rates(self, mixed, method="gptq", errors=4, compared=True):
        folder, measured, chosen = mixed
        ticks = (float(number**2) for number in count())
        view = open_model(folder, keep=False)
        trial = Trial(view, chosen, measured, METHODS[method], 4, errors, compared, whole=False)
        # a clock by which the same work takes longer every time: whatever is timed twice has a part for each token
        return view, trial.run(Stopwatch(lambda: next(ticks), lambda: 0.0))

    def test_every_kind_of_layer_and_every_piece_of_work_is_timed(self, mixed):
        view, rates = self.rates(mixed)
        assert rates.layers == block_kinds(view)
        assert rates.blocks.keys() == set(rates.layers)
        for layer, block in rates.blocks.items():
            routed = view.experts_path(layer) is not None
            assert min(block.inputs.token, block.linear, block.advance.token) > 0
            assert (block.solve > 0, block.expert.token > 0, block.experts > 0) == (routed, routed, routed)
            assert min(block.weights, block.forward.token, block.back.token, block.step) > 0
            assert (block.back_expert.of(1) > 0, block.back_slice.of(1) > 0) == (routed, routed)
            assert min(block.original.token, block.packed.of(1)) > 0
            assert min(block.read, block.write, block.bytes, block.written) > 0
        assert min(rates.ends, rates.labels.token, rates.score.token, rates.checkpoint, rates.step) > 0

    def test_a_method_without_data_needs_no_samples(self, mixed):
        _, rates = self.rates(mixed, "rtn", errors=None, compared=False)
        for block in rates.blocks.values():
            assert block.linear > 0
            assert {block.inputs, block.forward, block.back, block.original, block.packed} == {TokenCost()}
            assert block.weights == block.step == 0

    @pytest.mark.parametrize("measured_with", ["gradients", "none", "blank"])
    def test_solves_with_gradients_where_the_run_will(self, mixed, measured_with):
        folder, measured, chosen = mixed
        view, jobs = open_model(folder, keep=False), list[SolveBatch]()
        if measured_with == "none":
            kept = {n: {k: t for k, t in s.items() if "gradient" not in k} for n, s in measured.statistics.items()}
            measured = replace(measured, statistics=kept)
        if measured_with == "blank":
            own = measured.record.distributions[SELF].samples
            measured = blank_profile(view, str(folder), measured.names, measured.record.settings, own)

        def solved(job):
            jobs.append(job)
            return METHODS["gptq"].run(job)

        Trial(view, chosen, measured, Method("spy", solved), 4, None, False, whole=False).run()
        grams = [gram for job in jobs for some in job.outputs for gram in some if gram is not None]
        slopes = [inputs for job in jobs for inputs in job.inputs if inputs.slopes is not None]
        assert (bool(grams), bool(slopes)) == (measured_with != "none",) * 2

    def test_leaves_the_model_as_it_was(self, mixed):
        folder, measured, chosen = mixed
        view, tokens = open_model(folder, keep=False), torch.arange(16)[None]
        before = view.model(tokens).logits
        Trial(view, chosen, measured, METHODS["gptq"], 4, 4, True, whole=True).run()
        assert torch.equal(view.model(tokens).logits, before)

    def test_a_proof_compares_as_many_plans_as_are_foretold(self, mixed):
        _, measured, chosen = mixed
        strategies = [other.strategy for other in baselines(measured, chosen)]
        assert strategies == ["uniform", "uniform"] + ["frequency"] * bool(measured.expert_layers)
