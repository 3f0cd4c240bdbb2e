"""Importance of inputs, as encoders take it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.exports.importance import Importance, weights_of
from moqa.methods.ggml import rounded_as

FAST = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "iq4_xs", "q5_1")


def test_units_without_tokens_have_the_mean_of_the_others():
    seen = {"a": Importance(torch.tensor([2.0, 4.0]), 2), "b": Importance(torch.tensor([9.0, 9.0]), 3)}
    found = weights_of(seen | {"c": Importance(torch.zeros(2), 0)}, ["a", "b", "c", "d"], 2)
    assert found["a"].tolist() == [1.0, 2.0]
    assert found["c"].tolist() == found["d"].tolist() == [2.0, 2.5]


def test_a_layer_without_tokens_weighs_all_inputs_alike():
    assert weights_of({}, ["a"], 3)["a"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), dead=st.floats(0, 1), scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_inputs_that_are_never_seen_do_not_break_a_block(kind, seed, dead, scale):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 256, generator=generator) * torch.rand(2, 1, generator=generator)
    importance = torch.rand(256, generator=generator) * scale * (torch.rand(256, generator=generator) >= dead)
    found = rounded_as(weight, kind, importance)
    assert torch.isfinite(found).all()
    # wrong by less than the range of the row
    assert (found - weight).abs().max() <= 2 * weight.abs().max()
