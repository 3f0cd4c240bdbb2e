"""What all kernels must compute for the routed experts of a layer."""

import pytest
import torch
from exact import (
    BFLOAT,
    DTYPES,
    EXPERT_SCHEMES,
    FLOAT,
    MIXED,
    SEEDS,
    UNIT,
    activated,
    check,
    check_experts,
    each_quantizing,
    each_runner,
    make_layer,
    make_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH
from moqa.kernels import ACTIVATIONS, ExpertStack, PackedMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


@each_runner
class TestExperts:
    @settings(max_examples=80)
    @given(
        EXPERT_SCHEMES, st.integers(1, 9), st.integers(1, 150), st.integers(1, 150), st.sampled_from(ACTIVATIONS),
        st.booleans(), st.one_of(st.integers(2, 5), st.integers(1, 60)), st.integers(1, 4), st.booleans(), DTYPES,
        SEEDS,
    )  # fmt: skip
    def test_any_stack_and_tokens(
        self, runner, some, experts, hidden, inner, activation, bias, tokens, top_k, repeat, dtype, seed
    ):
        every = [some[place % len(some)] for place in range(3 * experts)]
        layer = make_layer(every, hidden, inner, activation, bias, seed)
        repeat = repeat and tokens > 1  # a test of its own
        check_experts(runner, layer, *make_tokens(layer, tokens, top_k, dtype, seed, repeat))

    @pytest.mark.parametrize("tokens", [1, 2, 17])
    def test_the_same_expert_twice_for_a_token(self, runner, tokens):
        layer = make_layer(MIXED, 72, 40, bias=True)
        for index in ([3, 3], [0, 1, 0], [2, 2, 2, 2]):
            x, _, weights = make_tokens(layer, tokens, len(index))
            check_experts(runner, layer, x, torch.tensor([index] * tokens), weights)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("bias", [False, True])
    def test_every_activation(self, runner, activation, bias):
        layer = make_layer(MIXED, 72, 200, activation, bias)
        for dtype in (FLOAT, BFLOAT):
            for tokens in (1, 2, 16, 40):
                check_experts(runner, layer, *make_tokens(layer, tokens, 2, dtype, tokens))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations_to_the_last_digits(self, runner, activation):
        # kept matrices that only copy: nothing else than the activation rounds
        size = 96
        copy_first = torch.cat([torch.eye(size), torch.zeros(size, size)], 1).bfloat16()
        weights = [copy_first, copy_first.roll(size, 1), copy_first.T.contiguous()]
        keep = Scheme(width=KEEP_WIDTH)
        parts = [[PackedMatrix(keep, (w.shape[0], w.shape[1]), {"weight": w})] for w in weights]
        stack = ExpertStack(*parts, activation)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 2 * size, generator=generator) * 10 ** (torch.rand(40, 1, generator=generator) * 4 - 2)
        x[0, :12] = torch.tensor([0.0, -0.0, 7.0, -7.0, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, 1e-30, 6.99])
        y = runner.experts(stack, x, torch.zeros(40, 1, dtype=torch.long), torch.ones(40, 1))[:, :size]
        gate, up = x.double()[:, :size], x.double()[:, size:]
        wanted, _, _ = activated(activation, gate, up)
        # relative to the gate where the activation itself cancels, as in 1 + erf(-3)
        check(y, wanted, 6 * UNIT * (wanted.abs() + gate.abs() * (up.abs() + 1)) + 1e-36)

    def test_special_routes(self, runner):
        layer = make_layer(MIXED, 72, 40, bias=True)
        x = make_tokens(layer, 6, 2)[0]
        weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
        for index in (
            [[0, 1], [1, 0], [0, 0], [1, 1], [0, 1], [0, 1]],  # most experts unused
            [[5, 2], [2, 5], [7, 99], [5, 5], [1, 2], [2**40, 0]],  # past the last: none
        ):
            check_experts(runner, layer, x, torch.tensor(index), weights)
        nothing = runner.experts(layer.stack, x, torch.full((6, 2), 5), weights)
        assert not nothing.any()
        assert not runner.experts(layer.stack, x, torch.tensor([[3, 4]] * 6), weights * 0).any()
        assert runner.experts(layer.stack, x[:0], torch.zeros(0, 2, dtype=torch.long), weights[:0]).shape == (0, 72)
        check_experts(runner, layer, x, torch.tensor([[4, 0]] * 6, dtype=torch.int32).long(), weights.bfloat16())

    def test_layouts_of_inputs_do_not_matter(self, runner):
        layer = make_layer(MIXED, 72, 40)
        x, index, weights = make_tokens(layer, 20, 2)
        plain = runner.experts(layer.stack, x, index, weights)
        other = [tensor.T.contiguous().T for tensor in (x, index, weights)]
        assert not any(tensor.is_contiguous() for tensor in other)
        assert torch.equal(runner.experts(layer.stack, *other), plain)

    def test_a_token_with_nan_leaves_others_alone(self, runner):
        layer = make_layer(MIXED, 72, 40)
        x, index, weights = make_tokens(layer, 20, 2)
        index[:, 0] = torch.arange(20) % 5
        clean = runner.experts(layer.stack, x, index, weights)
        hit = x.clone()
        hit[7, 3] = torch.nan
        y = runner.experts(layer.stack, hit, index, weights)
        assert y[7].isnan().all()
        others = torch.arange(20) != 7
        assert torch.equal(y[others], clean[others])


@each_quantizing
class TestQuantizedExperts:
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_token_does_not_depend_on_the_tokens_beside_it(self, runner, activation, dtype):
        layer = make_layer(MIXED, 72, 200, activation, bias=True)
        x, index, weights = make_tokens(layer, 60, 3, dtype)
        each = (slice(place, place + 1) for place in range(60))
        alone = torch.cat([runner.experts(layer.stack, x[at], index[at], weights[at]) for at in each])
        for tokens in (2, 5, 17, 60):
            found = runner.experts(layer.stack, x[:tokens], index[:tokens], weights[:tokens])
            assert torch.equal(found, alone[:tokens])

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_token_does_not_depend_on_the_number_of_threads(self, runner, activation):
        layer = make_layer(MIXED, 72, 300, activation)
        for tokens in (1, 2, 20, 60):
            x, index, weights = make_tokens(layer, tokens, 4)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(runner.experts(layer.stack, x, index, weights))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])

    def test_an_expert_is_its_three_products(self, runner):
        layer = make_layer([Scheme(width=KEEP_WIDTH)] * 3, 64, 32)
        x = torch.randn(5, 64)
        gate, up = (runner.linear(part[0].matrix, x) for part in (layer.gate, layer.up))
        wanted = runner.linear(layer.down[0].matrix, silu(gate) * up)
        found = runner.experts(layer.stack, x, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
