"""The grid search against plain min/max rounding, at its edges and with importance."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.format.planes import tile_rows, untile_rows
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.methods.grid import fit_grid

schemes = st.builds(
    Scheme, width=st.integers(2, 8), group_size=st.sampled_from([32, 64, 96]), symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16"]),
)  # fmt: skip


def random_weights(rows, features, seed, heavy=False):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, features, generator=generator)
    return weights.pow(3) if heavy else weights


def rounded(weights, scheme, **options):
    grid = fit_grid(weights, scheme, **options).grid
    return grid.decode(grid.encode(weights))


def plain_error(row, scheme):
    """[groups] squared error of min/max rounding with stored scales, in float64 and without a search."""
    errors, top = [], 2**scheme.width - 1
    for group in row.double().split(scheme.group_size):
        low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
        if scheme.symmetric:
            high = max(-low, high)
            low = -high * (top + 1) / (top - 1)
        scale = float(torch.tensor((high - low) / top).to(getattr(torch, scheme.scale_dtype)))
        if scale == 0:
            errors.append(float(group.square().sum()))
            continue
        zero = (top + 1) / 2 if scheme.symmetric else min(round(-low / scale / top * 255), 255) * top / 255
        back = scale * ((group / scale + zero).round().clamp(0, top) - zero)
        errors.append(float((back - group).square().sum()))
    return torch.tensor(errors, dtype=torch.float64)


def group_errors(weights, back, scheme):
    squared = (weights.double() - back.double()).square()
    return torch.stack([part.sum(-1) for part in squared.split(scheme.group_size, dim=-1)], -1)


class TestAgainstPlainRounding:
    @settings(max_examples=60)
    @given(schemes, st.integers(1, 4), st.integers(1, 150), st.integers(0, 10**6), st.booleans())
    def test_no_group_is_worse(self, scheme, rows, features, seed, heavy):
        weights = random_weights(rows, features, seed, heavy)
        found = group_errors(weights, rounded(weights, scheme), scheme)
        plain = torch.stack([plain_error(row, scheme) for row in weights])
        assert (found <= plain * 1.001 + 1e-12).all()

    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_the_search_gains(self, width):
        weights, scheme = random_weights(16, 256, 0), Scheme(width=width)
        plain = sum(float(plain_error(row, scheme).sum()) for row in weights)
        assert group_errors(weights, rounded(weights, scheme), scheme).sum() < 0.9 * plain

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_error_falls_by_about_four_per_bit(self, symmetric):
        weights = random_weights(16, 256, 1)
        errors = [
            float((rounded(weights, Scheme(width=w, symmetric=symmetric)) - weights).square().mean())
            for w in range(2, 8)
        ]
        assert all(2.5 < wide / narrow < 6 for wide, narrow in itertools.pairwise(errors))


class TestGrid:
    @settings(max_examples=60)
    @given(schemes, st.integers(1, 150), st.integers(0, 10**6))
    def test_integers_are_in_range_and_grid_values_are_fixed_points(self, scheme, features, seed):
        weights = random_weights(3, features, seed)
        grid = fit_grid(weights, scheme).grid
        integers = grid.encode(weights)
        assert integers.dtype == torch.uint8
        assert int(integers.max()) < 2**scheme.width
        assert torch.equal(grid.encode(grid.decode(integers)), integers)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_the_stored_dtypes_are_those_of_the_scheme(self, width):
        scheme = Scheme(width=width, scale_dtype="float16")
        grid, entries = fit_grid(random_weights(6, 100, 0), scheme).grid, scheme.tensors((6, 100))
        for suffix, values in {"scale": grid.scale, "zero": grid.zero}.items():
            tiled = tile_rows(values)
            assert (tiled.dtype, tuple(tiled.shape)) == entries[suffix]
            assert torch.equal(untile_rows(tiled, 6), values)

    def test_every_width_of_a_stack_is_fitted_as_alone(self):
        weights = torch.stack([random_weights(4, 100, seed) for seed in range(len(WIDTHS))])
        scheme = Scheme(width=8)
        mixed = rounded(weights, scheme, widths=torch.tensor(WIDTHS))
        for index, width in enumerate(WIDTHS):
            assert torch.equal(mixed[index], rounded(weights[index], Scheme(width=width)))

    def test_every_row_may_have_a_width_of_its_own(self):
        weights = random_weights(3, 64, 0)
        mixed = rounded(weights[None], Scheme(width=8), widths=torch.tensor([[2, 5, 8]]))[0]
        for row, width in enumerate((2, 5, 8)):
            assert torch.equal(mixed[row], rounded(weights, Scheme(width=width))[row])

    def test_an_index_selects_a_matrix(self):
        weights = torch.stack([random_weights(4, 64, seed) for seed in range(2)])
        grid = fit_grid(weights, Scheme(width=3)).grid
        assert torch.equal(grid[1].decode(grid[1].encode(weights[1])), grid.decode(grid.encode(weights))[1])


class TestEdges:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_zeros_stay_zero(self, width):
        assert not rounded(torch.zeros(2, 100), Scheme(width=width)).any()

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("value", [3.7, -3.7, 1e-30, -1e30])
    def test_a_constant_group_keeps_its_value(self, width, value):
        weights = torch.full((2, 70), value)
        assert torch.allclose(rounded(weights, Scheme(width=width)), weights, rtol=2**-8, atol=0)

    @pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-50, 2.0**50, 2.0**100])
    @pytest.mark.parametrize("features", [64, 70])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_magnitude_does_not_matter(self, magnitude, features, symmetric):
        weights, scheme = random_weights(4, features, 0) * magnitude, Scheme(width=4, symmetric=symmetric)
        back = rounded(weights, scheme)
        assert back.isfinite().all()
        found = group_errors(weights / magnitude, back.double() / magnitude, scheme)
        plain = torch.stack([plain_error(row / magnitude, scheme) for row in weights])
        # squares of such numbers leave float32, so the search may find nothing; plain rounding is the fallback
        assert (found <= 1.001 * plain).all()

    def test_one_outlier_takes_no_more_than_its_group(self):
        weights = random_weights(1, 128, 0)
        spoiled = weights.clone()
        spoiled[0, 5] = 1000.0
        scheme = Scheme(width=4)
        assert torch.equal(rounded(spoiled, scheme)[0, 64:], rounded(weights, scheme)[0, 64:])

    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_the_filling_of_a_short_group_costs_nothing(self, width):
        weights = random_weights(8, 72, 0)
        short = (rounded(weights, Scheme(width=width)) - weights)[:, 64:].square().sum(1)
        # the same eight weights four times over fill a group
        full = weights[:, 64:].repeat(1, 4)
        alone = (rounded(full, Scheme(width=width, group_size=32)) - full)[:, :8].square().sum(1)
        assert torch.allclose(short, alone)


class TestImportance:
    @pytest.mark.parametrize("features", [64, 100])
    def test_important_features_are_kept_better(self, features):
        weights, importance = random_weights(32, features, 0), torch.ones(features)
        importance[-8:] = 100.0
        plain = (rounded(weights, Scheme(width=3)) - weights).square()
        guided = (rounded(weights, Scheme(width=3), importance=importance) - weights).square()
        assert guided[:, -8:].sum() < 0.8 * plain[:, -8:].sum()
        assert (guided * importance).sum() < (plain * importance).sum()

    def test_equal_importance_changes_little(self):
        weights = random_weights(8, 100, 0)
        plain = (rounded(weights, Scheme(width=3)) - weights).square().sum()
        guided = (rounded(weights, Scheme(width=3), importance=torch.full((100,), 7.0)) - weights).square().sum()
        assert float(guided) == pytest.approx(float(plain), rel=0.01)

    def test_inputs_that_were_never_active_do_no_harm(self):
        weights, scheme = random_weights(8, 128, 0), Scheme(width=3)
        importance = torch.zeros(128)
        importance[64:] = torch.rand(64)
        guided = rounded(weights, scheme, importance=importance)
        assert torch.equal(guided[:, :64], rounded(weights, scheme)[:, :64])

    def test_a_stack_has_one_importance_each(self):
        weights = random_weights(4, 64, 0).expand(2, 4, 64)
        importance = torch.stack([torch.linspace(0.1, 10, 64), torch.linspace(10, 0.1, 64)])
        both = rounded(weights, Scheme(width=3), importance=importance)
        for index in range(2):
            assert torch.equal(both[index], rounded(weights[index], Scheme(width=3), importance=importance[index]))
