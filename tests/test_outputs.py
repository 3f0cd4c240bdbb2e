"""Gradients at outputs: their sketch, what units get of them, and how rows make up for each other's errors."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from long_work import SMALL
from torch.nn.functional import silu

import moqa
from moqa.calibration.inputs import InputStatistics
from moqa.calibration.outputs import SKETCHED, Gradients, GradientSketch, OutputGradients
from moqa.format.scheme import Scheme
from moqa.methods import METHODS, SolveBatch
from moqa.models.slopes import slopes
from moqa.models.view import open_model


def drawn(rows, features, seed, decay=0.0):
    """[rows, features] gradients whose directions are the less strong the later they come."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
    strength = torch.exp(-decay * torch.arange(features) / features)
    return torch.randn(rows, features, generator=generator) * strength @ mix


class TestSketch:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 60), st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([1e-12, 1.0, 1e6]))
    def test_few_features_are_kept_as_they_are(self, features, count, seed, size):
        gradients = drawn(count, features, seed) * size
        sketch = GradientSketch(features, seed)
        for part in gradients.split(100):
            sketch.add(part)
        wanted = gradients.double().T @ gradients.double() / count
        found = sketch.result(count).gram().double()
        assert (found - wanted).abs().max() <= 0.02 * wanted.diagonal().max()

    def test_many_features_keep_the_strong_directions_and_the_whole_energy(self):
        features, count = 3 * SKETCHED, 2000
        gradients = drawn(count, features, seed=1, decay=12.0)
        sketch = GradientSketch(features, 0)
        sketch.add(gradients.view(2, -1, features))
        found = sketch.result(count)
        assert found.rows.shape == (SKETCHED, features)
        wanted = gradients.T @ gradients / count
        assert (found.gram() - wanted).norm() <= 0.02 * wanted.norm()
        assert torch.allclose(found.gram().diagonal(), wanted.diagonal(), rtol=0.02)

    def test_nothing_is_nothing(self):
        sketch = GradientSketch(8, 0)
        sketch.add(torch.zeros(4, 8))
        assert not sketch.result(4).gram().any()

    def test_a_mixture_is_the_mean_by_shares(self):
        parts = [Gradients(drawn(5, 12, seed), torch.rand(12)) for seed in range(2)]
        found = Gradients.mixed(zip(parts, (0.25, 0.75), strict=True))
        assert torch.allclose(found.gram(), 0.25 * parts[0].gram() + 0.75 * parts[1].gram(), rtol=1e-4, atol=1e-5)
        weight = torch.randn(12, 7)
        assert torch.allclose(found.gram(weight), weight.T @ found.gram() @ weight, rtol=1e-4, atol=1e-4)


def test_slopes_are_derivatives():
    gate, up = torch.randn(9, 4), torch.randn(9, 4)
    sigma = gate.sigmoid()
    found = slopes(lambda x: silu(x[:, :4]) * x[:, 4:], torch.cat([gate, up], 1))
    assert torch.allclose(found, torch.cat([up * (sigma + gate * sigma * (1 - sigma)), silu(gate)], 1), atol=1e-6)


class TestUnits:
    @pytest.fixture(scope="class")
    def view(self, tiny_model):
        return open_model(tiny_model)

    def units(self, view, expert):
        return {unit.projection: unit for unit in view.block_units(0) if unit.expert == expert}

    def test_feed_forward_units_get_those_of_the_block(self, view):
        units = self.units(view, 1)
        down = view.weight(units["down_proj"]).float()
        gradients = Gradients(drawn(40, down.shape[0], 3), torch.rand(down.shape[0]))
        outputs, inputs = OutputGradients(view, 0, gradients), InputStatistics(down.shape[0])
        whole = gradients.rows.T @ gradients.rows + gradients.rest.diag()
        assert torch.allclose(outputs.gram(units["down_proj"], inputs), whole)
        assert outputs.gram(units["gate_proj"], inputs) is None  # no token reached it
        gate, up = torch.randn(2, 30, down.shape[1])
        inputs.add_slopes(gate[:10], up[:10])
        inputs.add_slopes(gate[10:], up[10:])
        before = down.T @ whole @ down
        for name, slope in (("gate_proj", gate), ("up_proj", up)):
            wanted = before * (slope.T @ slope)
            assert torch.allclose(outputs.gram(units[name], inputs), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())

    def test_others_get_none(self, view):
        outputs = OutputGradients(view, 0, Gradients(torch.ones(4, 8), torch.zeros(8)))  # of another size
        assert all(outputs.gram(unit, InputStatistics(unit.shape[1])) is None for unit in view.block_units(0))
        hidden = view.stream
        outputs = OutputGradients(view, 0, Gradients(torch.ones(4, hidden), torch.zeros(hidden)))
        attention = [unit for unit in view.block_units(0) if unit.role == "attention"]
        assert attention
        assert all(outputs.gram(unit, InputStatistics(unit.shape[1])) is None for unit in attention)


def job_of(scheme, parts, features, gram, count=2):
    """Matrices of some parts, with inputs and gradients at outputs that are correlated."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, sum(parts), features, generator=generator)
    inputs = []
    for entry in range(count):
        seen = InputStatistics(features)
        seen.add(drawn(1000, features, entry, decay=3.0), 1.0, check=False)
        inputs.append(seen)
    widths = torch.full((count, sum(parts)), scheme.width)
    outputs = [[gram(rows, entry) for rows in parts] for entry in range(count)]
    return SolveBatch(weights, widths, inputs, scheme, parts, outputs)


def correlated(rows, seed):
    gradients = drawn(500, rows, seed, decay=4.0)
    return gradients.T @ gradients


def losses(job, result):
    """[entries, parts] sums of squared changes of the loss."""
    errors = (result.decode() - job.weights).split(job.parts, 1)
    found = torch.empty(len(job.weights), len(job.parts))
    for entry, grams in enumerate(job.outputs):
        for part, gram in enumerate(grams):
            error = errors[part][entry]
            found[entry, part] = ((gram @ error @ job.inputs[entry].fit) * error).sum()
    return found


SCHEMES = [
    Scheme(width=3), Scheme(width=2, encoding="table"), Scheme(width=2, encoding="trellis"),
    Scheme(width=1, encoding="trellis"),
]  # fmt: skip


class TestRows:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_outputs_that_are_independent_change_nothing(self, scheme):
        job = job_of(scheme, (32, 48), 70, lambda rows, _: torch.eye(rows) * 3.0)
        found, plain = METHODS["gptq"].run(job), METHODS["gptq"].run(replace(job, outputs=[]))
        assert torch.equal(found.integers, plain.integers)

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("parts", [(64,), (32, 80)], ids=str)
    def test_rows_make_up_for_errors_of_others(self, scheme, parts):
        job = job_of(scheme, parts, 70, correlated)
        by_rows, plain = METHODS["gptq"].run(job), METHODS["gptq"].run(replace(job, outputs=[]))
        assert (losses(job, by_rows) < 0.9 * losses(job, plain)).all()
        # what is stored of a part is what it was rounded to
        assert torch.equal(by_rows.decode()[1, : parts[0]], by_rows[1, : parts[0]].decode())

    @pytest.mark.parametrize("gram", [lambda *_: None, lambda rows, _: torch.zeros(rows, rows)], ids=["none", "zero"])
    def test_without_gradients_it_is_plain(self, gram):
        job = job_of(SCHEMES[2], (32,), 40, gram)
        found, plain = METHODS["gptq"].run(job), METHODS["gptq"].run(replace(job, outputs=[]))
        assert torch.equal(found.integers, plain.integers)

    def test_rows_that_do_not_fill_tiles_are_rounded_together(self):
        job = job_of(SCHEMES[2], (40,), 40, correlated)
        found, plain = METHODS["gptq"].run(job), METHODS["gptq"].run(replace(job, outputs=[]))
        assert torch.equal(found.integers, plain.integers)

    @pytest.mark.parametrize("rank", [0, 1, 5])
    def test_gradients_of_few_tokens(self, rank):
        def gram(rows, seed):
            gradients = drawn(max(rank, 1), rows, seed) * min(rank, 1) * 1e-20
            return gradients.T @ gradients

        found = METHODS["gptq"].run(job_of(SCHEMES[0], (32,), 40, gram))
        assert torch.isfinite(found.decode()).all()


def test_held_out_errors_are_those_of_the_loss():
    x, difference, gram = torch.randn(50, 20), torch.randn(16, 20), correlated(16, 0)
    for features in (20, 60):  # as rows, and as their Gram matrix
        inputs = InputStatistics(20)
        for part in x.split(60 // (features // 20)):
            inputs.add(part, 0.5, check=True)
        wanted = 0.5 * float((gram @ difference @ x.T @ x @ difference.T).trace())
        assert float(inputs.check.errors(difference, gram).sum()) == pytest.approx(wanted, rel=1e-3)


def test_gradients_of_a_profile_reach_its_checkpoints(texts, tmp_path):
    model = make_tiny_model(tmp_path / "model", inner=48)  # three whole tiles
    profile = moqa.profile(model, [texts["wiki"]], tmp_path / "profile", **SMALL)
    plan = moqa.plan(profile, "2.5bpw")
    without = replace(
        profile,
        statistics={
            name: {key: value for key, value in found.items() if ".gradient_" not in key}
            for name, found in profile.statistics.items()
        },
    )
    assert profile.gradients(0, plan.mixture) is not None
    assert without.gradients(0, plan.mixture) is None
    made = [
        moqa.quantize(model, plan, tmp_path / name, profile=measured)
        for name, measured in (("rows", profile), ("plain", without))
    ]
    files = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in made]
    assert files[0].keys() == files[1].keys()
    assert files[0] != files[1]
