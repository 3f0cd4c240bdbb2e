"""Sums over inputs, and products in the precision in which weights are stored."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moqa.calibration.inputs import BlockInputs, CalibrationBatch, InputStatistics, by_input
from moqa.models.layerwise import LayerwiseModel
from moqa.models.precision import in_stored_precision
from moqa.models.products import fast_dtype, product
from moqa.models.view import open_model
from moqa.storage.resumable import resumable

needs_bfloat16 = pytest.mark.skipif(
    fast_dtype(torch.bfloat16) is None, reason="this processor does not multiply bfloat16 itself"
)


def rows(count, features, seed):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


class TestInputs:
    @given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([7, 600]), st.integers(0, 10**6))
    def test_sums_are_gram_matrices(self, counts, features, seed):
        inputs, wanted, held = InputStatistics(features), torch.zeros(2, features, features, dtype=torch.float64), 0
        for number, count in enumerate(counts):
            x, share = rows(count, features, seed + number), 0.5 + number
            for check in (False, True):
                inputs.add(x, share, check)
                wanted[int(check)] += share * x.double().T @ x.double()
            held += count
        assert inputs.tokens == held
        for found, exact in ((inputs.fit, wanted[0]), (inputs.check.gram, wanted[1])):
            # a library may round the inputs to bfloat16 on the way
            assert torch.allclose(found.double(), exact, rtol=0.02, atol=0.02 * float(exact.diagonal().max()))
            assert torch.allclose(found, found.T, rtol=1e-5, atol=1e-5 * float(found.diagonal().max()))
        assert torch.equal(inputs.energy, inputs.fit.diagonal())
        difference = rows(5, features, seed).double()
        error = ((difference @ wanted[1]) * difference).sum()
        assert float(inputs.check.errors(difference.float()).sum()) == pytest.approx(float(error), rel=0.02)
        sent = pickle.dumps(inputs.check)
        assert torch.equal(pickle.loads(sent).gram, inputs.check.gram)
        assert len(sent) < 4 * features * min(features, held) + 4000

    def test_nothing_seen_is_zero(self):
        inputs = InputStatistics(4)
        assert not inputs.fit.any()
        assert not inputs.energy.any()
        assert inputs.check.errors(torch.ones(2, 4)).tolist() == [0, 0]

    def test_units_that_are_called_with_one_tensor_share_their_sum(self, tiny_model, tmp_path):
        view = open_model(tiny_model, keep=False)
        stages = LayerwiseModel(view.model)
        hidden = stages.embed(torch.arange(40).reshape(2, 20))
        with torch.no_grad(), resumable(tmp_path / "out", {}) as work:
            found = BlockInputs(
                view, stages, 0, [CalibrationBatch(hidden), CalibrationBatch(hidden, check=True)], work
            ).linear
        spaces = by_input(u for u in view.block_units(0) if u.expert is None)
        assert found.keys() == spaces.keys()
        q, k, v, o = (found[name] for name in spaces if "self_attn" in name)
        assert q is k is v
        assert o is not q
        assert {inputs.tokens for inputs in found.values()} == {40}


class TestProduct:
    def test_is_exact_unless_asked(self):
        x, matrix = rows(3, 8, 0), rows(8, 5, 1).bfloat16()
        assert torch.equal(product(x, matrix), x @ matrix.float())

    def test_gradients_flow_to_the_left_side(self):
        x, matrix = rows(3, 8, 0).requires_grad_(True), rows(8, 5, 1).bfloat16()
        for dtype, bound in ((None, 0.0), (torch.bfloat16, 0.02)):
            (gradient,) = torch.autograd.grad(product(x, matrix, dtype).sum(), x)
            wanted = matrix.float().sum(1).expand(3, 8)
            assert (gradient - wanted).abs().max() <= bound * wanted.abs().max() + 1e-6

    @needs_bfloat16
    @pytest.mark.parametrize("keep", [True, False])
    def test_units_of_a_layer_multiply_as_they_are_stored(self, keep):
        view = open_model("reference/model", keep=keep)
        stages = LayerwiseModel(view.model)
        hidden = stages.embed(torch.arange(64).reshape(1, 64))
        with torch.no_grad():
            exact = stages.run_block(0, hidden)
            with in_stored_precision(view, 0):
                narrow = stages.run_block(0, hidden)
            assert torch.equal(stages.run_block(0, hidden), exact)
        assert 1e-6 < float((narrow - exact).norm() / exact.norm()) < 0.01
