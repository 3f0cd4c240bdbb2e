"""What all kernels must do in the two loops of quantization, whoever adds them."""

from dataclasses import replace

import pytest
import torch
from exact import level_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from moqa.format.encodings import ENCODINGS
from moqa.format.grid import to_groups
from moqa.format.levels import LevelGrid
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.kernels import GRID_KERNELS, Columns, native
from moqa.kernels.codes import nearest_codes

CPU = torch.device("cpu")


def runners():
    for kernels in GRID_KERNELS.values():
        if kernels.unusable(CPU) is None:
            for path in native.paths() if kernels.name == "native" else [None]:
                yield pytest.param((kernels, path), id=kernels.name if path is None else f"{kernels.name}-{path}")


@pytest.fixture(params=list(runners()), scope="module")
def kernels(request):
    found, path = request.param
    if path is not None:
        native.use_path(path)
    yield found
    if path is not None:
        native.use_path(native.paths()[0])


schemes = st.builds(
    Scheme, width=st.just(8), group_size=st.sampled_from([32, 64, 96]), symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16"]),
)  # fmt: skip
shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 150))


def random_problem(shape, seed, size):
    generator = torch.Generator().manual_seed(seed)
    weights = size * torch.randn(shape, generator=generator)
    widths = torch.randint(1, 9, shape[:2], generator=generator)
    importance = torch.rand(shape[0], shape[2], generator=generator) ** 4
    importance[:, : shape[2] // 3] *= torch.randint(0, 2, (1,), generator=generator)
    return weights, widths, importance


def rounded(weights, widths, scheme, importance):
    """About what it costs to round every group to steps from its least to its largest: [..., groups], as `error` is."""
    groups = to_groups(weights, scheme.group_size)
    steps = (groups.amax(-1) - groups.amin(-1)) / (2 ** widths[..., None] - 1)
    importance = torch.ones(len(weights), weights.shape[-1]) if importance is None else importance
    return steps.square() / 12 * to_groups(importance, scheme.group_size).sum(-1)[:, None]


class TestFitGrid:
    @settings(max_examples=60, deadline=None)
    @given(schemes, shapes, st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 30.0]), st.booleans())
    def test_finds_what_the_reference_finds(self, kernels, scheme, shape, seed, size, weighted):
        weights, widths, importance = random_problem(shape, seed, size)
        widths = widths.clamp(min=2) if scheme.symmetric else widths  # no scheme is symmetric with one bit
        importance = importance if weighted else None
        found = kernels.fit_grid(weights, widths, scheme, importance)
        wanted = GRID_KERNELS["reference"].fit_grid(weights, widths, scheme, importance)
        # ties and roundings may be decided otherwise: the result is then as good, but for a part of what rounding costs
        spare = 0.1 * rounded(weights, widths, scheme, importance)
        assert found.error.sum() <= wanted.error.sum() * 1.001 + spare.max()
        # and the search of a rare group may end in another minimum
        worse = found.error > wanted.error * 1.1 + spare
        assert worse.sum() <= 1 + worse.numel() // 100

    @settings(max_examples=40, deadline=None)
    @given(schemes, shapes, st.integers(0, 10**6), st.booleans())
    def test_integers_and_errors_are_those_of_the_grid(self, kernels, scheme, shape, seed, weighted):
        weights, widths, importance = random_problem(shape, seed, 1.0)
        found = kernels.fit_grid(weights, widths, scheme, importance if weighted else None)
        assert (found.integers < 2 ** widths[..., None]).all()
        off = (found.grid.decode(found.integers) - weights).double()
        nearest = (found.grid.decode(found.grid.encode(weights)) - weights).double()
        assert torch.allclose(off.abs(), nearest.abs(), rtol=1e-4, atol=1e-5)
        weight = torch.ones(shape[0], shape[2])
        if weighted:
            given = to_groups(importance, scheme.group_size)
            weight = (given + given.mean(-1, keepdim=True).clamp_min(1e-12) * 1e-2).flatten(1)[:, : shape[2]]
        squared = to_groups(off.square() * weight[:, None], scheme.group_size).sum(-1)
        assert torch.allclose(found.error.double(), squared, rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-42, 1e4, -1e4, 1e30])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_strange_weights_stay_on_the_grid(self, kernels, value, symmetric, dtype):
        scheme = Scheme(width=4, symmetric=symmetric, scale_dtype=dtype)
        weights = torch.full((1, 17, 70), value)
        weights[0, 3] = torch.linspace(-abs(value), abs(value), 70)
        found = kernels.fit_grid(weights, torch.full((1, 17), 4), scheme, None)
        assert int(found.integers.max()) < 16
        if 1e-6 < abs(value) < 1e5:
            back = found.grid.decode(found.integers)[0, 0]
            assert torch.allclose(back, weights[0, 0], rtol=0.02)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_a_row_does_not_depend_on_others_or_on_threads(self, kernels, width):
        weights = torch.randn(2, 50, 100, generator=torch.Generator().manual_seed(width))
        widths, scheme = torch.full((2, 50), width), Scheme(width=width)
        whole = kernels.fit_grid(weights, widths, scheme, None)
        torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
        part = kernels.fit_grid(weights[1:, 20:30], widths[1:, 20:30], scheme, None)
        assert torch.equal(whole.integers[1:, 20:30], part.integers)
        assert torch.equal(whole.grid.scale[1:, 20:30], part.grid.scale)

    def test_bfloat16_weights_are_taken_as_they_are(self, kernels):
        weights = torch.randn(2, 20, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        widths = torch.full((2, 20), 3)
        narrow, wide = (kernels.fit_grid(w, widths, Scheme(width=3), None) for w in (weights, weights.float()))
        assert torch.equal(narrow.integers, wide.integers)
        assert torch.equal(narrow.error, wide.error)


class TestFitPacked:
    @settings(max_examples=60, deadline=None)
    @given(schemes, shapes, st.sampled_from(WIDTHS), st.booleans(), st.integers(0, 10**6))
    def test_stores_what_fit_grid_finds(self, kernels, scheme, shape, width, narrow, seed):
        scheme = scheme.model_copy(update={"width": width, "symmetric": scheme.symmetric and width > 1})
        weights = random_problem(shape, seed, 1.0)[0][0].to(torch.bfloat16 if narrow else torch.float32)
        found = kernels.fit_packed(weights, scheme)
        apart = kernels.fit_grid(weights[None], torch.full((1, len(weights)), width), scheme, None)
        grid = apart.grid[0]
        wanted = grid.stored(pack(apart.integers[0], width))
        assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == scheme.tensors(shape[1:])
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class TestPack:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 50), st.integers(1, 140), st.sampled_from(WIDTHS), st.integers(0, 10**6))
    def test_gives_the_planes_of_the_format(self, kernels, rows, features, width, seed):
        generator = torch.Generator().manual_seed(seed)
        integers = torch.randint(0, 2**width, (rows, features), dtype=torch.uint8, generator=generator)
        found, wanted = kernels.pack(integers, width), pack(integers, width)
        assert [plane.shape for plane in found] == [plane.shape for plane in wanted]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


class TestRoundColumns:
    @settings(max_examples=40, deadline=None)
    @given(schemes, shapes, st.integers(1, 70), st.integers(0, 10**6))
    def test_every_column_is_rounded_from_its_weight_and_later_errors(self, kernels, scheme, shape, block, seed):
        weights, widths, _ = random_problem(shape, seed, 1.0)
        n, rows, features = shape
        grid = GRID_KERNELS["reference"].fit_grid(weights, widths, scheme, None).grid
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(features, generator=generator) for _ in range(n)])
        factor = 0.2 * torch.randn(n, features, features, generator=generator)
        diagonal = factor.diagonal(dim1=1, dim2=2).copy_(0.5 + torch.rand(n, features, generator=generator))
        start = weights.mT.gather(1, order[:, :, None].expand(n, features, rows))
        columns = Columns(
            order=order, work=start.clone(), factor=factor, scale=grid.scale.float().mT.contiguous(),
            offset=grid.offset().mT.contiguous(), top=grid.top[..., 0].contiguous(),
            integers=torch.zeros(n, features, rows, dtype=torch.uint8), group_size=scheme.group_size,
        )  # fmt: skip
        for first in reversed(range(0, features, block)):
            last = min(first + block, features)
            errors = factor[:, last:, first:last].mT @ columns.work[:, last:] / diagonal[:, first:last, None]
            kernels.round_columns(columns, columns.work[:, first:last] + errors, first)
        # what is left in `work` is the error of the integers
        stored = grid.decode(columns.integers.mT).mT.gather(1, order[:, :, None].expand(n, features, rows))
        assert torch.allclose(columns.work, start - stored, atol=1e-4)
        # and every integer is the nearest to what it was rounded from
        errors = (start - stored).double()
        share = factor.double().tril(-1).mT @ errors / diagonal[..., None]
        wanted = start.double() + share
        group = (order // scheme.group_size)[:, :, None].expand(n, features, rows)
        scale, offset = columns.scale.gather(1, group).double(), columns.offset.gather(1, group).double()
        at = torch.where(scale > 0, wanted / scale, 0) + offset
        integers = columns.integers.gather(1, order[:, :, None].expand(n, features, rows)).double()
        clamped = at.clamp(min=0).minimum(columns.top[:, None].double())
        slack = 0.5 + 1e-3 * (1 + at.abs() * 1e-2)
        assert ((integers - clamped).abs() <= slack).all()

    def test_what_does_not_fit_is_refused(self):
        if GRID_KERNELS["native"].unusable(CPU):
            pytest.skip("the native kernels were not built")
        ones = torch.ones(1, 4, 3)
        columns = Columns(
            order=torch.arange(4)[None], work=ones, factor=torch.eye(4)[None], scale=torch.ones(1, 1, 3),
            offset=torch.ones(1, 1, 3), top=torch.ones(1, 3), integers=torch.zeros(1, 4, 3, dtype=torch.uint8),
            group_size=32,
        )  # fmt: skip
        with pytest.raises(ValueError, match="from column 3"):
            GRID_KERNELS["native"].round_columns(columns, ones[:, :2], 3)
        with pytest.raises(ValueError, match="importance"):
            GRID_KERNELS["native"].fit_grid(ones, torch.full((1, 4), 2), Scheme(width=2), torch.ones(1, 5))


def coded_problem(parts, shape, encoding, seed, exact, apart=16):
    """Columns of some matrices whose parts have widths of their own; what is exact has sums without a rounding."""
    (n, features), rows, generator = shape, sum(parts), torch.Generator().manual_seed(seed)
    known = torch.tensor(ENCODINGS[encoding].widths, dtype=torch.uint8)
    width = known[torch.randint(len(known), (n, len(parts)), generator=generator)]
    width = width.repeat_interleave(torch.tensor(parts), 1)
    if exact:
        weights = torch.randint(-126, 127, (n, rows, features), generator=generator) / 2
        scale = 2.0 ** torch.randint(-1, 1, (n, rows), generator=generator)
    else:
        weights = 30 * torch.randn(n, rows, features, generator=generator)
        scale = 0.3 + torch.rand(n, rows, generator=generator)
    factor = torch.randint(1, 3, (n, rows, -(-features // 32)), dtype=torch.uint8, generator=generator)
    scale[torch.rand(n, rows, generator=generator) < 0.1] = 0.0
    grid = LevelGrid(encoding, scale / 2, factor, 32, width, tuple(parts), apart)
    order = torch.stack([torch.randperm(features, generator=generator) for _ in range(n)])
    return weights, grid, order, generator


def squared(values, parts):
    """[n, rows, columns] -> sums over each sequence of a trellis: rows of a part that are 16 apart."""
    of_parts = [pad(part, (0, 0, 0, -part.shape[1] % 16)).unflatten(1, (-1, 16)) for part in values.split(parts, 1)]
    return torch.cat([part.square().sum(1) for part in of_parts], 1)


some_parts = st.lists(st.integers(1, 70), min_size=1, max_size=3)
encodings = st.sampled_from(["table", "trellis"])


class TestRoundCodes:
    @settings(max_examples=60, deadline=None)
    @given(
        some_parts, st.integers(1, 3), st.integers(1, 70), encodings, st.integers(0, 10**6), st.sampled_from([4, 16])
    )
    def test_all_kernels_find_the_same(self, kernels, parts, n, features, encoding, seed, apart):
        weights, grid, order, generator = coded_problem(parts, (n, features), encoding, seed, True, apart)
        factors = [None]
        if features <= 3:  # halves of halves: with more columns some sums would be rounded
            factor = torch.randint(-1, 2, (n, features, features), generator=generator) / 2
            factors.append(factor.tril(-1) + torch.eye(features))
        for factor in factors:
            found, wanted = (Columns.of(weights, grid, order, factor) for _ in range(2))
            kernels.round_columns(found, found.work.clone(), 0)
            GRID_KERNELS["reference"].round_columns(wanted, wanted.work.clone(), 0)
            assert torch.equal(found.integers, wanted.integers)
            assert torch.equal(found.work, wanted.work)

    @settings(max_examples=30, deadline=None)
    @given(some_parts, st.integers(1, 2), st.integers(1, 50), st.integers(1, 70), encodings, st.integers(0, 10**6))
    def test_every_column_has_the_best_codes(self, kernels, parts, n, features, block, encoding, seed):
        weights, grid, order, generator = coded_problem(parts, (n, features), encoding, seed, exact=False)
        factor = 0.05 * torch.randn(n, features, features, generator=generator)
        diagonal = factor.diagonal(dim1=1, dim2=2).copy_(0.5 + torch.rand(n, features, generator=generator))
        columns = Columns.of(weights, grid, order, factor)
        start = columns.work.clone()
        for first in reversed(range(0, features, block)):
            last = min(first + block, features)
            errors = factor[:, last:, first:last].mT @ columns.work[:, last:] / diagonal[:, first:last, None]
            kernels.round_columns(columns, columns.work[:, first:last] + errors, first)
        at = order[:, :, None].expand(start.shape)
        stored = grid.decode(columns.integers.mT).mT.gather(1, at)
        size = 1 + start.abs().max() + stored.abs().max()
        assert ((columns.work - (start - stored)).abs() <= 1e-5 * size).all()
        # from what each was rounded, in double precision, and the best codes for it
        wanted = start.double() + factor.double().tril(-1).mT @ (start - stored).double() / diagonal[..., None]
        scale = columns.scale.double().gather(1, (at // 32))
        each = zip(wanted.unbind(1), scale.unbind(1), strict=True)
        best = torch.stack([nearest_codes(*column, grid)[1] for column in each], 1)
        cost, least = (squared((wanted - x).mT, parts) for x in (stored, best))
        assert (cost <= least * (1 + 1e-5) + 1e-6 * (size + wanted.abs().max()) ** 2).all()

    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from([(1, 16), (1, 32), (1, 40), (1, 48), (1, 64), (2, 16), (2, 32), (2, 37), (2, 48), (3, 32)]),
        st.integers(0, 10**6), st.sampled_from([1e-8, 1.0, 1e8, 1e16]),
    )  # fmt: skip
    def test_no_other_codes_of_a_trellis_are_better(self, kernels, case, seed, size):
        (width, rows), generator = case, torch.Generator().manual_seed(seed)
        value, steps = torch.randn(rows, generator=generator), torch.rand(rows, generator=generator) / 63 + 0.01
        scheme = Scheme(width=width, encoding="trellis")
        ones, widths = torch.ones(1, rows, 1, dtype=torch.uint8), torch.full((1, rows), width)
        grid = LevelGrid("trellis", size * steps[None], ones, 32, widths, (rows,))
        columns = Columns.of(size * value[None, :, None], grid, torch.zeros(1, 1, dtype=torch.int64), None)
        kernels.round_columns(columns, columns.work.clone(), 0)
        tiles = -(-rows // 16)
        every = torch.cartesian_prod(*[torch.arange(2**width)] * tiles).view(-1, tiles)
        # a column for each, the same in all sixteen sequences; rows beyond the last have code 0
        codes = every.T.repeat_interleave(16, 0)[:rows].clone()
        level = level_of(scheme, codes).double()
        off = squared((value[:, None].double() - steps[:, None].double() * level)[None], [rows])[0]
        found = (value.double() - grid.decode(columns.integers.mT)[0, :, 0].double() / size)[None, :, None]
        assert torch.allclose(squared(found, [rows])[0, :, 0], off.amin(1), rtol=1e-5)

    @settings(max_examples=40, deadline=None)
    @given(some_parts, st.integers(1, 70), st.integers(0, 10**6))
    def test_codes_of_a_table_are_the_nearest_levels(self, kernels, parts, features, seed):
        weights, grid, order, _ = coded_problem(parts, (2, features), "table", seed, exact=False)
        columns = Columns.of(weights, grid, order, None)
        kernels.round_columns(columns, columns.work.clone(), 0)
        every = torch.stack([grid.decode(torch.full(weights.shape, code)) for code in range(16)])
        there = torch.arange(16)[:, None, None, None] < 2 ** grid.width[..., None].long()
        nearest = torch.where(there, (weights - every).abs(), torch.inf).amin(0)
        off = (weights - grid.decode(columns.integers.mT)).abs()
        assert (off <= nearest + 1e-4).all()

    def test_threads_change_nothing(self, kernels):
        weights, grid, order, generator = coded_problem([100, 30, 16], (2, 40), "trellis", 0, exact=False)
        factor = torch.eye(40) + 0.1 * torch.randn(2, 40, 40, generator=generator)
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            columns = Columns.of(weights, grid, order, factor)
            kernels.round_columns(columns, columns.work.clone(), 0)
            found.append(columns.integers)
        assert torch.equal(*found)

    def test_parts_that_are_not_the_rows_are_refused(self):
        if GRID_KERNELS["native"].unusable(CPU):
            pytest.skip("the native kernels were not built")
        weights, grid, order, _ = coded_problem([20, 30], (1, 8), "table", 0, exact=False)
        columns = Columns.of(weights, replace(grid, parts=(20, 20)), order, None)
        with pytest.raises(ValueError, match="parts of"):
            GRID_KERNELS["native"].round_columns(columns, columns.work.clone(), 0)
