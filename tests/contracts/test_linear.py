"""What all kernels must compute for one matrix: every scheme, any rows, and inputs that hardly are numbers."""

import pytest
import torch
from exact import (
    BFLOAT,
    CODED,
    DTYPES,
    FLOAT,
    NATIVE,
    ROWS,
    SCHEMES,
    SEEDS,
    Known,
    check,
    check_linear,
    each_quantizing,
    each_runner,
    each_scheme,
    make_bias,
    make_matrix,
    make_rows,
    needs_native,
    product,
    schemes,
    stored,
    unquantized,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.format.planes import pack, tile_rows
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH, WIDTHS
from moqa.kernels import PackedMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


@each_runner
class TestLinear:
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_every_scheme(self, runner, dtype):
        for seed, scheme in enumerate(SCHEMES):
            shape = (1 + seed * 37 % 75, 1 + seed * 91 % 290)
            known = make_matrix(scheme, shape, seed)
            for rows in (1, 2, 3, 4, 9):
                check_linear(runner, known, make_rows(rows, shape[1], dtype, seed), None)

    @settings(max_examples=120)
    @given(
        schemes(), st.integers(1, 200), st.integers(1, 400), ROWS, DTYPES, st.sampled_from([None, FLOAT, BFLOAT]), SEEDS
    )
    def test_any_matrix_and_rows(self, runner, scheme, out, features, rows, dtype, bias, seed):
        known = make_matrix(scheme, (out, features), seed)
        x = make_rows(rows, features, dtype, seed + 1)
        check_linear(runner, known, x, None if bias is None else make_bias(out, seed, bias))

    @settings(max_examples=15)
    @given(schemes(), st.integers(1, 40), st.integers(2, 140), DTYPES, SEEDS)
    def test_inputs_of_any_layout(self, runner, scheme, out, features, dtype, seed):
        known = make_matrix(scheme, (out, features), seed)
        x = make_rows(12, features, dtype, seed)
        wide = torch.full((12, 2 * features), torch.nan, dtype=dtype)
        wide[:, ::2] = x
        for same in (x.view(3, 4, features), x.T.contiguous().T, wide[:, ::2], x.view(1, 6, 2, features)):
            check_linear(runner, known, same, None)
            if runner.quantizes:
                assert torch.equal(runner.linear(known.matrix, same).view(12, out), runner.linear(known.matrix, x))
        check_linear(runner, known, x[:1].expand(5, features), make_bias(out, seed))
        check_linear(runner, known, x.view(3, 4, features).transpose(0, 1), None)
        check_linear(runner, known, x[2], None)
        assert runner.linear(known.matrix, x[:0]).shape == (0, out)

    def test_inputs_stay_as_they_were(self, runner):
        known = make_matrix(Scheme(width=3), (40, 100), 0)
        x, bias = make_rows(20, 100, FLOAT, 0), make_bias(40, 0)
        before = [tensor.clone() for tensor in (x, bias, *known.matrix.buffers())]
        runner.linear(known.matrix, x, bias)
        assert all(torch.equal(*pair) for pair in zip(before, (x, bias, *known.matrix.buffers()), strict=True))

    @each_scheme(*WIDTHS, KEEP_WIDTH)
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_zero_rows_give_exactly_the_bias(self, runner, scheme, dtype):
        known, bias = make_matrix(scheme, (37, 150), scheme.width), make_bias(37, scheme.width)
        for rows in (1, 3, 9, 40):
            x = make_rows(rows, 150, dtype, rows)
            x[rows // 2] = 0.0
            x[0] = -0.0
            y = runner.linear(known.matrix, x, bias)
            assert torch.equal(y[rows // 2], bias.to(dtype))
            assert torch.equal(y[0], bias.to(dtype))
            assert not runner.linear(known.matrix, x)[rows // 2].any()

    @each_scheme(1, 2, 3, 4, 8, KEEP_WIDTH)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_rows_with_nan_or_infinity_say_so_and_leave_others_alone(self, runner, scheme, bad):
        known = make_matrix(scheme, (37, 150), scheme.width)
        for dtype in (FLOAT, BFLOAT):
            for rows in (2, 3, 5, 9, 120):
                x = make_rows(rows, 150, dtype, rows)
                clean = runner.linear(known.matrix, x)
                for column in (0, 70, 149):
                    hit = x.clone()
                    hit[rows // 2, column] = bad
                    y = runner.linear(known.matrix, hit, make_bias(37, 1))
                    if runner.quantizes and not scheme.is_unquantized:
                        assert y[rows // 2].isnan().all()
                    else:  # a weight that is zero makes infinity NaN, and another keeps it
                        assert not y[rows // 2].isfinite().any()
                    others = torch.arange(rows) != rows // 2
                    assert torch.equal(runner.linear(known.matrix, hit)[others], clean[others])

    @each_scheme(1, 3, 8, KEEP_WIDTH)
    @pytest.mark.parametrize("size", [1e30, 1e37, 3e38, 1e-30, 1e-36, 1e-38, 1e-42])
    def test_huge_and_tiny_inputs_give_right_numbers_or_none(self, runner, scheme, size):
        known = make_matrix(scheme, (37, 150), scheme.width)
        for dtype in (FLOAT, BFLOAT):
            for rows in (1, 3, 9):
                x = torch.randn(rows, 150, generator=torch.Generator().manual_seed(rows)).clamp(-1, 1) * size
                x = x.to(dtype)
                y = runner.linear(known.matrix, x)
                wanted, bound = product(known, x.double(), None, runner.quantizes, dtype)
                bound = bound + stored(wanted.abs() + bound, dtype) + 151 * 2.0**-133  # subnormals round coarsely
                if size < 1e36:
                    check(y, wanted, bound)
                finite = y.isfinite()
                check(y[finite], wanted[finite], bound[finite])

    @pytest.mark.parametrize("shape", [(16, 32), (37, 150), (5, 5)], ids=str)
    def test_every_byte_of_codes_and_factors_means_the_same_to_all_kernels(self, runner, shape):
        generator = torch.Generator().manual_seed(shape[1])
        for scheme in CODED:
            tensors = make_matrix(scheme, shape, 0).matrix.state_dict()
            for tensor in tensors.values():
                if tensor.dtype == torch.uint8:
                    tensor.random_(0, 256, generator=generator)
            matrix = PackedMatrix(scheme, shape, tensors)
            weights = matrix.dense().double()
            # the lowest level is 3, so that a level and 128 are at most 44 times as much
            known = Known(matrix, weights, 44 * weights.abs())
            assert weights.isfinite().all()
            for rows in (1, 2, 9):
                check_linear(runner, known, make_rows(rows, shape[1], FLOAT, rows), None)


@each_quantizing
class TestQuantizedInputs:
    def test_halves_round_to_even(self, runner):
        # with a largest input of 127 a step is exactly 1, and weights of 1 show each rounded input
        steps = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49, 3.51, 126.5, 125.5, -126.5, 0.49, -127.0])
        eye = torch.eye(32).bool()
        tensors = {f"p{i}": plane for i, plane in enumerate(pack(eye.to(torch.uint8), 1))}
        tensors["scale"], tensors["zero"] = tile_rows(torch.ones(32, 1).bfloat16()), tile_rows(eye[:, :1].byte() * 0)
        matrix = PackedMatrix(Scheme(width=1, group_size=32), (32, 32), tensors)
        x = torch.zeros(1, 32)
        x[0, : len(steps)] = steps
        for rows in (1, 2, 5, 30):
            y = runner.linear(matrix, x.expand(rows, 32))
            assert torch.equal(y, x.round().expand(rows, 32))

    def test_groups_have_scales_of_their_own(self, runner):
        known = make_matrix(Scheme(width=8, group_size=32), (16, 96), 0)
        x = torch.randn(1, 96)
        for loud in range(3):
            louder = x.clone()
            louder[0, 32 * loud : 32 * loud + 32] *= 1e6
            quiet = louder.clone()
            quiet[0, 32 * loud : 32 * loud + 32] = 0.0
            exact, cost = unquantized(known, quiet.double())
            check(runner.linear(known.matrix, quiet), exact, cost + 1e-4)
            check_linear(runner, known, louder, None)

    @each_scheme(*WIDTHS, KEEP_WIDTH)
    def test_a_row_does_not_depend_on_the_rows_beside_it(self, runner, scheme):
        for dtype, group, shape in ((FLOAT, 64, (200, 330)), (BFLOAT, 96, (75, 200)), (FLOAT, 32, (16, 33))):
            known = make_matrix(scheme.model_copy(update={"group_size": group}), shape, scheme.width)
            x, bias = make_rows(300, shape[1], dtype, scheme.width), make_bias(shape[0], scheme.width)
            alone = torch.cat([runner.linear(known.matrix, x[i : i + 1], bias) for i in range(300)])
            for rows in (2, 3, 4, 5, 7, 17, 97, 300):
                assert torch.equal(runner.linear(known.matrix, x[:rows], bias), alone[:rows]), rows
                assert torch.equal(runner.linear(known.matrix, x[300 - rows :], bias), alone[300 - rows :]), rows

    @each_scheme(2, 3, 8, KEEP_WIDTH)
    def test_a_row_does_not_depend_on_the_number_of_threads(self, runner, scheme):
        # one row of a matrix of this size is enough work for several threads
        known = make_matrix(scheme, (1100, 1000 if scheme.width < 8 else 250), scheme.width)
        for rows, dtype in ((1, FLOAT), (2, BFLOAT), (17, FLOAT), (150, BFLOAT)):
            x = make_rows(rows, known.matrix.shape[1], dtype, rows)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(runner.linear(known.matrix, x))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])


@needs_native
@settings(max_examples=60)
@given(schemes(), st.integers(1, 200), st.integers(1, 400), ROWS, DTYPES, SEEDS)
def test_native_paths_agree(scheme, out, features, rows, dtype, seed):
    known, x = make_matrix(scheme, (out, features), seed), make_rows(rows, features, dtype, seed)
    found = [runner.linear(known.matrix, x) for runner in NATIVE]
    wanted, bound = product(known, x.double(), None, True, dtype)
    for y in found[1:]:
        check(y, found[0].double(), 2 * bound + 2 * stored(wanted.abs() + bound, dtype))
