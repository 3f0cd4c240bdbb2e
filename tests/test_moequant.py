"""MoEQuant's two parts: text that is balanced over the experts, and Gram matrices weighted by gates."""

import pytest
import torch

from moqa.calibration.inputs import BlockInputs, CalibrationBatch
from moqa.errors import MoqaError
from moqa.methods import METHODS
from moqa.models.experts import observed
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import open_model
from moqa.profiling import profile, read_profile
from moqa.profiling.balanced import BEAM, TEMPERATURE, balanced_sample, expert_counts, imbalance
from moqa.storage.resumable import resumable


@pytest.fixture(scope="module")
def view(tiny_model):
    return open_model(tiny_model)


class TestBalanced:
    def test_imbalance_is_the_published_sigma(self):
        counts = torch.tensor([3.0, 1.0, 0.0, 4.0])
        shares = counts / 8
        wanted = (4 / 3 * ((shares - 0.25) ** 2).sum()) ** 0.5
        assert imbalance(counts) == pytest.approx(float(wanted))
        assert imbalance(torch.ones(4)) == 0

    def test_is_deterministic_and_as_long_as_asked(self, view):
        found = balanced_sample(view, 3, 12, seed=5)
        assert found.shape == (3, 12)
        assert torch.equal(found, balanced_sample(view, 3, 12, seed=5))
        assert not torch.equal(found, balanced_sample(view, 3, 12, seed=6))

    def test_is_the_best_candidate_of_a_search_without_a_cache(self, view):
        """The same search written another way: every candidate is read from its beginning."""
        begin = balanced_sample(view, 1, 1, seed=0)
        beam = [(begin[0].tolist(), 0.0)]
        for _ in range(4):
            grown = []
            for tokens, total in beam:
                likely = view.model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
                top = likely.topk(BEAM)
                grown += [([*tokens, int(t)], total + float(p)) for p, t in zip(top.values, top.indices, strict=True)]

            def score(candidate):
                tokens, total = candidate
                spread = imbalance(expert_counts(view, torch.tensor([tokens]))).mean()
                return -total / (len(tokens) - 1) + float(spread) / TEMPERATURE

            beam = sorted(grown, key=score)[:BEAM]
        assert balanced_sample(view, 1, 5, seed=0)[0].tolist() == beam[0][0]

    def test_a_profile_says_how_its_text_was_written(self, tiny_model, texts, tmp_path):
        options = {"samples": 2, "context": 16, "self_samples": 2, "method": "rtn"}
        made = profile(tiny_model, [texts["wiki"]], tmp_path / "p", own_text="balanced", **options)
        assert read_profile(tmp_path / "p").record.settings.own_text == "balanced"
        assert made.samples("self").tolist() == balanced_sample(open_model(tiny_model), 2, 16, 0).tolist()
        with pytest.raises(MoqaError, match="own_text balanced"):
            profile(tiny_model, [texts["wiki"]], tmp_path / "p", **options)
        with pytest.raises(MoqaError, match="--own-text even is unknown: there are drawn, balanced"):
            profile(tiny_model, [texts["wiki"]], tmp_path / "q", own_text="even", **options)


class TestAffinity:
    def test_gram_matrices_are_weighted_by_the_power_of_the_gate(self, view, tmp_path):
        stages = LayerwiseModel(view.model)
        hidden = stages.embed(torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(0)))
        calls = []

        class Calls:
            def routed(self, index, weights):
                calls.append((index, weights))

            def expert(self, run):
                calls.append(run)

        with torch.no_grad(), observed(view.experts(0), Calls()):
            stages.run_block(0, hidden)
        run = next(one for one in calls[1:] if len(one.x) > 2)
        for method in ("gptq", "gptq-affinity", "gptq-plain"):
            power = METHODS[method].affinity
            with resumable(tmp_path / method, {}) as work:
                inputs = BlockInputs(view, stages, 0, [CalibrationBatch(hidden)], work, affinity=power)
                gram = inputs.experts([run.expert])[f"model.layers.0.mlp.experts.{run.expert}.in"].fit
                inputs.drop()
            weighted = run.x * run.gate**power
            wanted = weighted.T @ weighted
            # a block computes in the precision of its file, bfloat16; other powers are 10 % away
            assert (gram - wanted).norm() < 0.02 * wanted.norm()

    def test_methods_differ_in_nothing_else(self):
        assert [METHODS[name].affinity for name in ("gptq-plain", "gptq-affinity", "gptq")] == [0, 0.5, 1]
        assert all(METHODS[name].needs_data for name in ("gptq-plain", "gptq-affinity"))
