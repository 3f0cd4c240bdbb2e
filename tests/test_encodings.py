"""A model whose units mix encodings: everything that runs packed units takes their tensors as they are."""

import itertools

import pytest
import torch
from exact import CODED

import moqa
from moqa.adjustment import adjust
from moqa.adjustment.residuals import Grams, fit_unit
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.planning import plan
from moqa.planning.account import account_of
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.reports.allocation import allocations
from moqa.reports.gather import Artifacts
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.packed import PackedLinear, packed_product
from moqa.runtime.verify import verify

IDS = torch.randint(0, 8192, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encodings") / "profile"
    return profile(tiny_model, [texts["wiki"]], folder, samples=4, context=32, self_samples=1)


@pytest.fixture(scope="module")
def planned(measured):
    """Codes of every kind and integers of six bits, in turns."""
    made = plan(measured, strategy="uniform", widths=(6,))
    units = dict(zip(made.units, itertools.cycle((*CODED, Scheme(width=6))), strict=False))
    return made.model_copy(update={"units": units, "account": account_of(measured, units)})


@pytest.fixture(scope="module")
def packed(tiny_model, measured, planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encodings") / "out"
    return quantize(tiny_model, planned, folder, method="rtn", profile=measured, cache="full")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def error(found, expected):
    """Of the median token: a router with a near tie may choose another expert after any change of rounding."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()


def test_all_kernels_compute_the_same_model(packed):
    expected = logits(moqa.load(packed, kernels="reference")[0])
    model = moqa.load(packed)[0]
    assert error(logits(model), expected) < 0.03
    assert FusedDecoder.of(model) is not None
    assert not verify(packed).faults


def test_gradients_are_those_of_unpacked_weights(packed):
    model = moqa.load(packed)[0]
    schemes = set()
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.matrix.scheme not in schemes:
            schemes.add(module.matrix.scheme)
            x = torch.randn(3, module.in_features, requires_grad=True)
            packed_product(module.kernels, module.matrix, x).square().sum().backward()
            y = x.detach() @ module.matrix.dense().T
            torch.testing.assert_close(x.grad, 2 * y @ module.matrix.dense(), rtol=0.05, atol=0.05 * x.grad.abs().max())
    assert len(schemes) > len(CODED)


@pytest.mark.parametrize("mode", ["residual", "requant"])
def test_adjustments(packed, texts, tmp_path, mode):
    adjust(packed, [texts["python"]], tmp_path / mode, mode=mode, samples=8, budget="30%")
    model = moqa.load(packed)[0]
    before = logits(model)
    model.apply(tmp_path / mode)
    adjusted = logits(model)
    assert not torch.equal(adjusted, before)
    other = moqa.load(packed, kernels="reference")[0]
    other.apply(tmp_path / mode)
    assert error(adjusted, logits(other)) < 0.03
    model.revert()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("scheme", [scheme for scheme in CODED if scheme.width > 1], ids=str)
def test_a_unit_that_loses_a_bit_keeps_its_encoding(scheme):
    weight = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    tensors = fit_unit(weight, "layers.0.experts.1.up_proj", scheme, Grams([1]))
    kept = PackedMatrix(scheme, (40, 72), tensors).dense()
    assert (kept - weight).norm() < 0.5 * weight.norm()


def test_plans_that_differ_in_their_encodings_are_two(planned):
    integers = {name: scheme.model_copy(update={"encoding": "int"}) for name, scheme in planned.units.items()}
    other = planned.model_copy(update={"units": integers})
    assert len(allocations(Artifacts(plans={"a": planned, "b": planned, "c": other}))) == 2
