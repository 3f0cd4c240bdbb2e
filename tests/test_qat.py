"""Quantization-aware training: modules compute with what is stored, bit for bit, and learn on its grid."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, random_model
from hypothesis import given
from hypothesis import strategies as st
from long_work import refusal
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModelForCausalLM

from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.models.experts import expert_matrix
from moqa.models.parts import LinearPart
from moqa.models.view import ModelView
from moqa.qat import Inputs, prepare
from moqa.qat.inputs import OwnRange, TrainedRange
from moqa.qat.straight import on_grid
from moqa.qat.weights import WeightGrid
from moqa.runtime.growing import cache_for

SCHEMES = [
    Scheme(width=width, group_size=group, symmetric=symmetric)
    for width in (1, 2, 3, 4, 8) for group in (32, 64) for symmetric in (False, True) if width > 1 or not symmetric
]  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 20, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(20 * 9, 10),
    )  # fmt: skip


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "qat.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert {"0.weight.p0", "0.weight.scale", "0.weight.zero"} == names["tensors"].keys()


class TestWeightGrid:
    @given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31), st.booleans())
    def test_computes_with_what_is_stored_bit_for_bit(self, scheme, rows, features, seed, is_float16):
        torch.manual_seed(seed)
        scheme = scheme.model_copy(update={"scale_dtype": "float16" if is_float16 else "bfloat16"})
        weight = torch.randn(rows, features) * torch.rand(rows, 1)
        grid = WeightGrid(weight, scheme, rows)
        for parameter in grid.parameters():
            parameter.data = torch.randn_like(parameter) * 0.5
        weight = weight + 0.1 * torch.randn_like(weight)
        packed = PackedMatrix(scheme, (rows, features), grid.stored(weight))
        assert torch.equal(grid(weight), packed.dense())

    @given(st.sampled_from(SCHEMES), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31))
    def test_gradients_are_those_of_the_rounding_seen_as_a_shift(self, scheme, rows, features, seed):
        torch.manual_seed(seed)
        groups = -(-features // scheme.group_size)
        weight = (torch.randn(rows, features, dtype=torch.float64) * 3).requires_grad_()
        scale = (torch.rand(rows, groups, dtype=torch.float64) + 0.5).requires_grad_()
        offset = (torch.rand(rows, groups, dtype=torch.float64) * 3).requires_grad_()
        top = torch.full((rows, groups), 2.0**scheme.width - 1, dtype=torch.float64)
        out = torch.randn(rows, features, dtype=torch.float64)
        (on_grid(weight, scale, offset, top, scheme.group_size) * out).sum().backward()
        found = [value.grad.clone() for value in (weight, scale, offset)]
        for value in (weight, scale, offset):
            value.grad = None
        each = [value.repeat_interleave(scheme.group_size, 1)[:, :features] for value in (scale, offset, top)]
        position = weight / each[0] + each[1]
        # rounding as a shift that does not depend on anything
        clamped = position.clamp(torch.zeros(()).double(), each[2])
        ((clamped + (clamped.round() - clamped).detach() - each[1]) * each[0] * out).sum().backward()
        for mine, value in zip(found, (weight, scale, offset), strict=True):
            assert torch.allclose(mine, value.grad)

    def test_begins_anew(self):
        torch.manual_seed(0)
        weight, grid = torch.randn(8, 64), WeightGrid(torch.ones(8, 64), Scheme(width=3), 8)
        grid.growth.data.fill_(0.5)
        grid.begin(weight)
        assert torch.equal(grid(weight), WeightGrid(weight, Scheme(width=3), 8)(weight))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_better_grid_is_learned(self, scheme):
        torch.manual_seed(0)
        weight = torch.randn(32, 128)
        grid = WeightGrid(1.5 * weight, scheme, 32)
        optimizer = torch.optim.Adam(grid.parameters(), lr=0.02)
        before = mse_loss(grid(weight), weight)
        for _ in range(60):
            optimizer.zero_grad()
            loss = mse_loss(grid(weight), weight)
            loss.backward()
            optimizer.step()
        assert loss < 0.98 * before


class TestInputs:
    @given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from([32, None]))
    def test_own_ranges_keep_the_largest_and_round_the_others(self, seed, bits, group):
        torch.manual_seed(seed)
        x = torch.randn(5, 96).requires_grad_()
        rounded = OwnRange(bits, group)(x)
        groups = rounded.detach().unflatten(1, (-1, 32 if group else 96))
        step, each = groups.abs().amax(-1, keepdim=True) / 127, 127 / (2 ** (bits - 1) - 1)
        # kernels round to whole steps
        assert torch.allclose((groups / step).round(), groups / step, atol=1e-3)
        assert len((groups / step).round().unique()) <= 2**bits - 1
        assert torch.allclose(rounded, x, atol=float(step.max()) * (each / 2 + 0.5) + 1e-6)
        rounded.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))

    @pytest.mark.parametrize("has_sign", [False, True])
    def test_trained_ranges_begin_with_the_first_batch_and_learn(self, has_sign):
        torch.manual_seed(0)
        x = torch.randn(64, 32) if has_sign else torch.rand(64, 32)
        rounding = TrainedRange(4)
        first = rounding(x)
        assert len(first.detach().unique()) <= 16
        assert mse_loss(first, x) < 0.03 * x.square().mean()
        begun = copy.deepcopy(rounding)
        assert torch.equal(rounding(10 * x).max(), first.max())
        optimizer = torch.optim.Adam(rounding.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            mse_loss(rounding(2 * x), 2 * x).backward()
            optimizer.step()
        assert mse_loss(rounding(2 * x), 2 * x) < 0.7 * mse_loss(begun(2 * x), 2 * x)
        rounding.start_again()
        assert torch.equal(rounding(x), first)

    def test_only_4_and_8_bits(self):
        assert refusal(Inputs, 3) == "inputs of 3 bits are not supported: give 4 or 8"


class TestPrepare:
    @pytest.mark.parametrize("inputs", [None, Inputs(8), Inputs(4, trained=True)])
    def test_what_is_trained_is_what_is_packed(self, inputs):
        torch.manual_seed(1)
        model, images, labels = network(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
        trained = prepare(model, Scheme(width=3, group_size=32), inputs=inputs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]
        assert all(bool(part.grad.isfinite().all()) for part in model.parameters())
        stored, shapes, schemes = trained.stored(), trained.shapes(), trained.schemes()
        assert sum(tensor.nbytes for tensor in stored.values()) == trained.bytes
        for name, scheme in schemes.items():
            matrix = PackedMatrix(scheme, shapes[name], scheme.among(stored, name, shapes[name]))
            module = model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.weight.flatten(1), matrix.dense())
        with torch.no_grad():
            expected = model(images)
            packed = trained.pack("reference")
            assert not [name for name, _ in packed.named_parameters() if "original" in name]
            exact = inputs is None or inputs.trained
            assert torch.allclose(packed(images), expected, atol=1e-5 if exact else 0.05)

    def test_a_packed_linear_layer_gives_the_same_bits(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(100, 40)), torch.randn(7, 100)
        trained = prepare(model, Scheme(width=2))
        expected = model(x).detach()
        assert torch.equal(trained.pack("reference")(x).detach(), expected)

    def test_remove_leaves_an_ordinary_model(self):
        model, x = network(), torch.randn(2, 3, 8, 8)
        names = {name for name, _ in model.named_parameters()}
        trained = prepare(model, Scheme(width=4), inputs=Inputs(8))
        rounded = model[2].weight.detach().clone()
        plain = trained.remove()
        assert {name for name, _ in plain.named_parameters()} == names
        assert torch.equal(plain[2].weight, rounded)
        assert not plain[2]._forward_pre_hooks
        plain(x).sum().backward()

    def test_schemes_by_name_and_patterns(self):
        trained = prepare(network(), {"0.weight": Scheme(width=8), "5.weight": Scheme(width=2)})
        assert {name: scheme.width for name, scheme in trained.schemes().items()} == {"0.weight": 8, "5.weight": 2}
        assert set(prepare(network(), Scheme(width=4), keep=["0", "5*"]).schemes()) == {"2.weight"}

    def test_an_embedding_and_experts(self, tiny_model):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trained = prepare(model, Scheme(width=4), keep=["lm_head", "*.gate"])
        stored, view = trained.stored(), ModelView(AutoModelForCausalLM.from_pretrained(tiny_model))
        assert {f"{name}.weight" for name in view.units} == trained.schemes().keys() - {"model.embed_tokens.weight"}
        for name, scheme in trained.schemes().items():
            shape = trained.shapes()[name]
            dense = PackedMatrix(scheme, shape, scheme.among(stored, name, shape)).dense()
            unit = view.units.get(name.removesuffix(".weight"))
            if unit is None or unit.expert is None:
                found = model.get_submodule(name.removesuffix(".weight")).weight
            else:
                found = expert_matrix(model.get_submodule(unit.module), unit.expert, unit.projection)
            assert torch.equal(found, dense)
        model(torch.arange(8)[None]).logits.sum().backward()
        assert "belongs to Embedding, which cannot be packed" in refusal(trained.pack)

    def test_refusals(self):
        assert "(LSTM) has weight_ih_l0, which cannot be rounded" in refusal(prepare, nn.LSTM(3, 4), Scheme(width=4))
        tied = nn.ModuleDict({"a": nn.Embedding(4, 8), "b": nn.Linear(8, 4)})
        tied["b"].weight = tied["a"].weight
        assert "a.weight and b.weight are one weight" in refusal(prepare, tied, Scheme(width=4))
        assert "no weight is left" in refusal(prepare, network(), Scheme(width=4), keep=["*"])
        assert "9.weight is not a weight" in refusal(prepare, network(), {"9.weight": Scheme(width=4)})
        coded = Scheme(width=2, encoding="trellis", group_size=64)
        assert "cannot be trained as codes of trellis" in refusal(prepare, network(), coded)

    def test_refusals_of_experts(self):
        model = random_model("qwen3_moe")
        names = [f"{name}.weight" for name, unit in ModelView(model).units.items() if unit.role == "expert"]
        some = dict.fromkeys(names[:-1], Scheme(width=4))
        assert f"{names[-1]} is left as it is, and other experts" in refusal(prepare, model, some)
        said = refusal(prepare, random_model("gpt_oss"), Scheme(width=4), keep=["*router"], cache_bits=8)
        assert said == "a gpt_oss model has a DynamicSlidingWindowLayer, which cannot be rounded: leave out --kv-bits"


TOKENS = torch.randint(2, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
WIDTHS = itertools.cycle([2, 3, 4, 8])


def trained_family(name, **options):
    """A random language model after a step with rounded units, of different widths and groups, and what it predicts."""
    model = random_model(name)
    # parts of a matrix have no parameter of their own
    units = [
        n for n, unit in ModelView(model).units.items() if not isinstance(model.get_submodule(unit.module), LinearPart)
    ]
    schemes = {
        f"{n}.weight": Scheme(width=next(WIDTHS), group_size=32 * (1 + at % 2), symmetric=at % 5 == 0)
        for at, n in enumerate(units)
    }
    trained = prepare(model, schemes, **options)
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.is_floating_point()], lr=1e-3)
    model(TOKENS).logits.square().mean().backward()
    grids = [part for n, part in model.named_parameters() if n.endswith((".growth", ".shift"))]
    assert sum(bool(part.grad.any()) for part in grids) > 0.8 * len(grids)
    optimizer.step()
    with torch.no_grad():
        return trained, model(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize(
        ("inputs", "kernels"),
        [(Inputs(4, trained=True), "reference"), (Inputs(8), "native"), (Inputs(4), "native")],
    )
    def test_what_is_trained_is_what_is_packed(self, family, inputs, kernels):
        trained, expected = trained_family(family, inputs=inputs)
        with torch.no_grad():
            found = trained.pack(kernels)(TOKENS).logits
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        if kernels == "reference":  # experts are summed in another order
            assert float(errors.max()) < 1e-5
        # Native kernels sum groups in another order. The last bit of a sum decides now and then to which side an input
        # of a later layer is rounded, and it moves by a step, or a token is routed to another expert.
        assert float(errors.median()) < 1e-4
        assert float(errors.mean()) < 0.02


def test_a_rounded_cache_is_that_of_the_packed_model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    schemes = {f"{name}.weight": Scheme(width=4) for name in ModelView(model).units}
    tokens = TOKENS % model.config.vocab_size
    exact = model(tokens).logits.detach()
    trained = prepare(model, schemes, cache_bits=8)
    model(tokens).logits.square().mean().backward()
    keys = model.model.layers[0].self_attn.k_proj.parametrizations.weight.original
    assert bool(keys.grad.any())
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(model(tokens, use_cache=False).logits, expected, atol=1e-5)
        packed = trained.pack("reference")
        without = packed(tokens, use_cache=False).logits
        cache = cache_for(packed)
        assert cache.rounded
        found = packed(tokens, past_key_values=cache).logits
    assert not torch.allclose(expected, exact, atol=1e-3)
    assert (found - expected).norm() < 1e-4 * expected.norm() < (found - without).norm()
