"""Layers that hide their matrices, made visible, compute what they did."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moqa.models.adapt import adapt
from moqa.models.layout import Convolution
from moqa.models.parts import LinearPart

WIDTH, HEADS, LONG, SHORT, BATCH = 64, 4, 7, 5, 3
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(LONG)[None] > torch.tensor([[3], [6], [5]])},
    "added": {"attn_mask": torch.linspace(-2, 2, SHORT * LONG).view(SHORT, LONG)},
    "of each head": {"attn_mask": torch.arange(BATCH * HEADS * SHORT * LONG).view(-1, SHORT, LONG) % 3 == 0},
    "both": {
        "attn_mask": torch.ones(SHORT, LONG).triu(3).bool(),
        "key_padding_mask": torch.arange(LONG)[None].expand(BATCH, -1) > 5,
    },
}


class TestAttentionOfPyTorch:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("average", [True, False])
    def test_it_computes_what_it_did(self, mask, batch_first, bias, average):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first).eval()
        if bias:
            nn.init.normal_(module.in_proj_bias)
        inputs = [torch.randn(BATCH, length, WIDTH) for length in (SHORT, LONG, LONG)]
        inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
        wanted = module(*inputs, average_attn_weights=average, **MASKS[mask])
        adapt(module)
        found = module(*inputs, average_attn_weights=average, **MASKS[mask])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        assert module(*inputs, need_weights=False)[1] is None

    def test_it_takes_one_sequence(self):
        module, x = nn.MultiheadAttention(WIDTH, HEADS).eval(), torch.randn(LONG, WIDTH)
        wanted = module(x, x, x)
        adapt(module)
        for one, other in zip(module(x, x, x), wanted, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_layer_of_pytorch_does_not_go_past_it(self):
        layer, x = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, batch_first=True).eval(), torch.randn(2, SHORT, WIDTH)
        wanted = layer(x)
        adapt(layer)
        seen = []
        layer.self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted)
        assert seen

    def test_parameters_stay(self):
        module = nn.MultiheadAttention(WIDTH, HEADS)
        names = list(module.state_dict())
        adapt(module)
        assert list(module.state_dict()) == names
        assert sum(isinstance(part, LinearPart) for part in module.modules()) == 3


class TestConvolutionsOfSequences:
    @given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(12, 20))
    def test_it_is_a_product_with_patches(self, kernel, stride, padding, dilation, length):
        module = nn.Conv1d(8, 16, kernel, stride, padding, dilation)
        x, layout = torch.randn(2, 8, length), Convolution.of(module)
        rows = layout.patches(x) @ module.weight.flatten(1).T + module.bias
        torch.testing.assert_close(layout.outputs(rows, x), module(x), rtol=1e-4, atol=1e-5)
