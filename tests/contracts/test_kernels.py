"""What all kernels must compute, whoever adds them: the products in double precision, up to the rounding they may do.

Kernels that quantize activations (`QUANTIZING`) are held to the same quantization in double precision, and to what it
may cost against exact inputs. Every bound here is derived, none is fitted: what exceeds it is a wrong number.
"""

import copy
import io
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, silu

from moqa.errors import MoqaError
from moqa.format.grid import from_groups, to_groups
from moqa.format.planes import pack, tile_rows
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH, WIDTHS
from moqa.kernels import ACTIVATIONS, KERNELS, ExpertStack, Kernels, PackedMatrix, find_kernels, native
from moqa.runtime.packed import PackedExperts, PackedLinear

CPU = torch.device("cpu")
FLOAT, BFLOAT = torch.float32, torch.bfloat16
GROUPS = (32, 64, 96, 128)
# kernels that round activations to 8 bits per group of inputs, and whose rows do not depend on each other
QUANTIZING = ("native",)
UNIT = 2.0**-24  # relative error of one rounding to float32
UNIT_BFLOAT = 2.0**-8
# groups whose scale would be smaller count as zero; it is far below anything a model computes with
SMALLEST_SCALE = 1e-36
SMALLEST = 2.0**-126


@dataclass(frozen=True)
class Runner:
    """Kernels on one of their paths."""

    kernels: Kernels
    path: str | None = None

    @property
    def quantizes(self) -> bool:
        return self.kernels.name in QUANTIZING

    def linear(self, matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self._choose()
        return self.kernels.linear(matrix, x, bias)

    def experts(self, stack: ExpertStack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._choose()
        return self.kernels.experts(stack, x, index, weights)

    def _choose(self) -> None:
        if self.path is not None:
            native.use_path(self.path)

    def __str__(self) -> str:
        return self.kernels.name if self.path is None else f"{self.kernels.name}-{self.path}"


def runners() -> Iterator[Runner]:
    for kernels in KERNELS.values():
        if kernels.unusable(CPU) is None:
            for path in native.paths() if kernels.name == "native" else [None]:
                yield Runner(kernels, path)


RUNNERS = list(runners())
NATIVE = [runner for runner in RUNNERS if runner.path is not None]
each_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
each_quantizing = pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner.quantizes], ids=str)
needs_native = pytest.mark.skipif(not NATIVE, reason="the native kernels were not built")


@pytest.fixture(scope="module", autouse=True)
def as_before():
    """Paths and threads are the whole process's: what follows must find them as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower on several
    yield
    torch.set_num_threads(threads)
    if NATIVE:
        native.use_path(native.paths()[0])


# --- matrices and the double-precision truth ---------------------------------------------------------------------


@dataclass
class Known:
    """A packed matrix with its weights in double precision.

    `weights` is s (q - o), and `terms` s (q + o): what is added up where a kernel takes the zero-point out of the sum.
    """

    matrix: PackedMatrix
    weights: Tensor
    terms: Tensor

    @property
    def group(self) -> int | None:
        return None if self.matrix.scheme.is_unquantized else self.matrix.scheme.group_size


def make_matrix(scheme: Scheme, shape: tuple[int, int], seed: int, size: float = 1.0) -> Known:
    """Any integers, scales and zeros that a checkpoint may hold; weights have about the given size."""
    generator = torch.Generator().manual_seed(seed)
    out, features = shape
    if scheme.is_unquantized:
        weight = (torch.randn(shape, generator=generator) * size).bfloat16()
        return Known(PackedMatrix(scheme, shape, {"weight": weight}), weight.double(), weight.double().abs())
    top, groups = scheme.levels - 1, -(-features // scheme.group_size)
    integers = torch.randint(0, scheme.levels, shape, generator=generator, dtype=torch.uint8)
    # rows at the end of the range are where sums are largest
    edge = torch.randint(0, 6, (out, 1), generator=generator)
    integers = torch.where(edge == 0, top, torch.where(edge == 1, top * (integers & 1), integers)).to(torch.uint8)
    scale = 2.0 ** (torch.rand(out, groups, generator=generator) * 4 - 3) * size / max(top, 1)
    scale[torch.rand(out, groups, generator=generator) < 0.02] = 0.0
    scale = scale.to(getattr(torch, scheme.scale_dtype))
    tensors = {f"p{index}": plane for index, plane in enumerate(pack(integers, scheme.width))}
    tensors["scale"] = tile_rows(scale)
    offset = torch.full((out, groups), 2.0 ** (scheme.width - 1), dtype=torch.float64)
    if not scheme.symmetric:
        zero = torch.randint(0, 256, (out, groups), generator=generator, dtype=torch.uint8)
        tensors["zero"] = tile_rows(zero)
        offset = zero.double() * top / 255
    per_group, scales = to_groups(integers.double(), scheme.group_size), scale.double()[..., None]
    weights = from_groups(scales * (per_group - offset[..., None]), features)
    terms = from_groups(scales * (per_group + offset[..., None]), features)
    return Known(PackedMatrix(scheme, shape, tensors), weights, terms)


def rounded(x: Tensor, group: int, doubt: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows rounded to 8 bits per group, half to even, and how far a sound kernel's may be from them.

    Float32 arithmetic may put a value that lies next to the middle of two steps to the other one; `doubt` is how
    far each of the values themselves may be off.
    """
    groups, features = to_groups(x, group), x.shape[-1]
    wrong = to_groups(torch.as_tensor(doubt, dtype=torch.float64).expand_as(x), group)
    worst = wrong.amax(-1, keepdim=True)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, groups / scale, 0.0)
    reach = torch.where(scale > 0, (wrong + worst) / scale, 0.0) + 1e-4
    unsure = ((steps - steps.floor() - 0.5).abs() <= reach) | (reach > 0.5)
    # where the largest value is off by `worst`, so is each of the 127 steps' sum
    error = unsure * scale * reach.ceil() + worst + torch.where(scale < 2 * SMALLEST_SCALE, groups.abs() + scale, 0.0)
    return from_groups(steps.round() * scale, features), from_groups(error, features)


def stored(y: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding a result to the output's dtype may cost."""
    return (UNIT_BFLOAT * 1.01 if dtype == BFLOAT else 0.0) * y.abs() + 1e-44


def product(
    known: Known, x: Tensor, bias: Tensor | None, quantizes: bool, dtype: torch.dtype, doubt: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """[..., out] in double precision and how far a sound kernel may be from it; `doubt` is of the inputs."""
    features = x.shape[-1]
    if quantizes and known.group is not None:
        x, error = rounded(x, known.group, doubt)
        # sums within a group are exact; each group adds a few roundings of its two terms
        additions = -(-features // known.group) + 8
    else:
        error = torch.as_tensor(doubt, dtype=torch.float64).expand_as(x)
        additions = features + 8
    unit = UNIT if quantizes or dtype == FLOAT else 2 * UNIT_BFLOAT
    if not quantizes and dtype == BFLOAT:
        additions = 2  # weights and the bias in the inputs' dtype, sums in float32
    y = x @ known.weights.T
    bound = error @ known.weights.abs().T + additions * unit * ((x.abs() + error) @ known.terms.T)
    if not quantizes:  # torch may take subnormal inputs and products for zero
        bound = bound + SMALLEST * (known.terms.sum(-1) + features)
    if bias is not None:
        y, bound = y + bias.double(), bound + 2 * unit * (bias.double().abs() + y.abs())
    return y, bound


def check(found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Every number within its bound, which the message shows where one is not."""
    found = found.double()
    assert found.shape == wanted.shape
    wrong = ~((found - wanted).abs() <= bound)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} differ, first at {where}: {found[where]:.9g}, should be "
            f"{wanted[where]:.9g} within {bound[where]:.3g}"
        )


def make_rows(rows: int, features: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Inputs of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    x *= 10 ** (torch.rand(rows, 1, generator=generator) * 6 - 3)
    x[torch.rand(rows, features, generator=generator) < 0.1] = 0.0
    if rows > 3:
        x[1] = 0.0
    return x.to(dtype)


def make_bias(out: int, seed: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(out, generator=torch.Generator().manual_seed(seed)).to(dtype)


SCHEMES = [
    Scheme(width=width, group_size=group, symmetric=symmetric, scale_dtype=("bfloat16", "float16")[place % 2])
    for place, (width, group, symmetric) in enumerate(
        (w, g, s) for w in (*WIDTHS, KEEP_WIDTH) for g in GROUPS for s in (False, True) if not (s and w == 1)
    )
]


def schemes(widths: tuple[int, ...] = (*WIDTHS, KEEP_WIDTH)) -> st.SearchStrategy[Scheme]:
    return st.builds(
        lambda width, group, symmetric, scale: Scheme(
            width=width, group_size=group, symmetric=symmetric and width > 1, scale_dtype=scale
        ),
        st.sampled_from(widths), st.sampled_from(GROUPS), st.booleans(), st.sampled_from(["bfloat16", "float16"]),
    )  # fmt: skip


SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([FLOAT, BFLOAT])
# mostly few, sometimes up to the largest
ROWS = st.one_of(st.integers(1, 7), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40), st.integers(41, 1000))


def unquantized(known: Known, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product with exact inputs and the most that 8-bit inputs may cost: half a step per input, in norm."""
    if known.group is None:
        return x @ known.weights.T, torch.zeros(len(x), len(known.weights), dtype=torch.float64)
    scale = to_groups(x, known.group).abs().amax(-1) / 127
    steps = scale[..., None].expand(*scale.shape, known.group).flatten(-2)[:, : x.shape[1]]
    steps = torch.where(steps < 2 * SMALLEST_SCALE, 2 * x.abs(), steps)
    return x @ known.weights.T, torch.outer((steps / 2).norm(dim=1), known.weights.norm(dim=1))


def check_linear(runner: Runner, known: Known, x: Tensor, bias: Tensor | None) -> None:
    y = runner.linear(known.matrix, x, bias)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], known.matrix.shape[0]))
    rows, y = x.double().reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    wanted, bound = product(known, rows, bias, runner.quantizes, x.dtype)
    check(y, wanted, bound + stored(wanted.abs() + bound, x.dtype))
    if runner.quantizes:
        exact, cost = unquantized(known, rows)
        exact = exact if bias is None else exact + bias.double()
        # values next to the middle of two steps count in `cost` already
        plain = product(known, rounded(rows, known.group or 32)[0], bias, False, FLOAT)[1]
        check(y, exact, cost * 1.001 + plain + stored(exact.abs() + cost + plain, x.dtype))


# --- linear ------------------------------------------------------------------------------------------------------


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

    @pytest.mark.parametrize("width", [*WIDTHS, KEEP_WIDTH])
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_zero_rows_give_exactly_the_bias(self, runner, width, dtype):
        known, bias = make_matrix(Scheme(width=width), (37, 150), width), make_bias(37, width)
        for rows in (1, 3, 9, 40):
            x = make_rows(rows, 150, dtype, rows)
            x[rows // 2] = 0.0
            x[0] = -0.0
            y = runner.linear(known.matrix, x, bias)
            assert torch.equal(y[rows // 2], bias.to(dtype))
            assert torch.equal(y[0], bias.to(dtype))
            assert not runner.linear(known.matrix, x)[rows // 2].any()

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 8, KEEP_WIDTH])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_rows_with_nan_or_infinity_say_so_and_leave_others_alone(self, runner, width, bad):
        known = make_matrix(Scheme(width=width), (37, 150), width)
        for dtype in (FLOAT, BFLOAT):
            for rows in (2, 3, 5, 9, 120):
                x = make_rows(rows, 150, dtype, rows)
                clean = runner.linear(known.matrix, x)
                for column in (0, 70, 149):
                    hit = x.clone()
                    hit[rows // 2, column] = bad
                    y = runner.linear(known.matrix, hit, make_bias(37, 1))
                    if runner.quantizes and width != KEEP_WIDTH:
                        assert y[rows // 2].isnan().all()
                    else:  # a weight that is zero makes infinity NaN, and another keeps it
                        assert not y[rows // 2].isfinite().any()
                    others = torch.arange(rows) != rows // 2
                    assert torch.equal(runner.linear(known.matrix, hit)[others], clean[others])

    @pytest.mark.parametrize("width", [1, 3, 8, KEEP_WIDTH])
    @pytest.mark.parametrize("size", [1e30, 1e37, 3e38, 1e-30, 1e-36, 1e-38, 1e-42])
    def test_huge_and_tiny_inputs_give_right_numbers_or_none(self, runner, width, size):
        known = make_matrix(Scheme(width=width), (37, 150), width)
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

    @pytest.mark.parametrize("width", [*WIDTHS, KEEP_WIDTH])
    def test_a_row_does_not_depend_on_the_rows_beside_it(self, runner, width):
        for dtype, group, shape in ((FLOAT, 64, (200, 330)), (BFLOAT, 96, (75, 200)), (FLOAT, 32, (16, 33))):
            known = make_matrix(Scheme(width=width, group_size=group), shape, width)
            x, bias = make_rows(300, shape[1], dtype, width), make_bias(shape[0], width)
            alone = torch.cat([runner.linear(known.matrix, x[i : i + 1], bias) for i in range(300)])
            for rows in (2, 3, 4, 5, 7, 17, 97, 300):
                assert torch.equal(runner.linear(known.matrix, x[:rows], bias), alone[:rows]), rows
                assert torch.equal(runner.linear(known.matrix, x[300 - rows :], bias), alone[300 - rows :]), rows

    @pytest.mark.parametrize("width", [2, 3, 8, KEEP_WIDTH])
    def test_a_row_does_not_depend_on_the_number_of_threads(self, runner, width):
        # one row of a matrix of this size is enough work for several threads
        known = make_matrix(Scheme(width=width), (1100, 1000 if width < 8 else 250), width)
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


# --- experts -----------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """Experts of one layer, and a stack of them."""

    gate: list[Known]
    up: list[Known]
    down: list[Known]
    activation: str
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    stack: ExpertStack = field(init=False)

    def __post_init__(self) -> None:
        parts = ([known.matrix for known in part] for part in (self.gate, self.up, self.down))
        self.stack = ExpertStack(*parts, self.activation, self.gate_bias, self.up_bias, self.down_bias)

    @property
    def hidden(self) -> int:
        return self.gate[0].matrix.shape[1]


def make_layer(
    schemes: list[Scheme], hidden: int, inner: int, activation: str = "silu", bias: bool = False, seed: int = 0
) -> Layer:
    """Three matrices per expert, with the schemes in turn."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Known]] = [[], [], []]
    for place, scheme in enumerate(schemes):
        shape = (hidden, inner) if place % 3 == 2 else (inner, hidden)
        # gates reach the places where activations bend and where gpt_oss clamps them
        parts[place % 3].append(make_matrix(scheme, shape, seed + place, size=4 * shape[1] ** -0.5))
    count = len(schemes) // 3
    biases = [torch.randn(count, width, generator=generator) if bias else None for width in (inner, inner, hidden)]
    return Layer(*parts, activation, *biases)


def activated(name: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What joins gate and up, and how steep it is in each (an upper bound)."""
    if name == "swiglu_clamped":
        low, clamped = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        bent = low * torch.sigmoid(1.702 * low)
        return (clamped + 1) * bent, (clamped + 1).abs(), bent.abs()
    bent = silu(gate) if name == "silu" else gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
    return bent * up, up.abs(), bent.abs()


def expert_sum(layer: Layer, x: Tensor, index: Tensor, weights: Tensor, quantizes: bool) -> tuple[Tensor, Tensor]:
    """[tokens, hidden] in double precision, slot by slot, and how far a sound kernel may be from it."""
    dtype = x.dtype
    total, bound = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    unit = UNIT if quantizes or dtype == FLOAT else 2 * UNIT_BFLOAT
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            if expert >= len(layer.gate):
                continue
            biases = [None if b is None else b[expert] for b in (layer.gate_bias, layer.up_bias, layer.down_bias)]
            row = x[token : token + 1].double()
            gate, gate_error = product(layer.gate[expert], row, biases[0], quantizes, dtype)
            up, up_error = product(layer.up[expert], row, biases[1], quantizes, dtype)
            inner, by_gate, by_up = activated(layer.activation, gate, up)
            # none of the activations is steeper than 1.13
            error = 1.13 * gate_error * (by_gate + up_error) + by_up * up_error
            error += 16 * unit * (gate.abs() + gate_error) * (by_gate + up_error) + 1e-36
            out, out_error = product(layer.down[expert], inner, biases[2], quantizes, dtype, error)
            total[token] += weight * out[0]
            bound[token] += weight.abs() * (out_error[0] + 2 * unit * (out[0].abs() + out_error[0]))
            bound[token] += index.shape[1] * UNIT * total[token].abs()
    return total, bound


def check_experts(runner: Runner, layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> None:
    y = runner.experts(layer.stack, x, index, weights)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    wanted, bound = expert_sum(layer, x, index, weights, runner.quantizes)
    check(y, wanted, bound + stored(wanted.abs() + bound, x.dtype))


def make_tokens(
    layer: Layer, tokens: int, top_k: int, dtype: torch.dtype = FLOAT, seed: int = 0, repeat: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of one size, experts (some past the last, with `repeat` some twice for a token) and gate weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, generator=generator).to(dtype)
    many = max(len(layer.gate) + 1, top_k)
    index = torch.rand(tokens, many, generator=generator).argsort(-1)[:, :top_k]
    if repeat:
        index = torch.randint(0, len(layer.gate) + 1, (tokens, top_k), generator=generator)
    return x, index, torch.rand(tokens, top_k, generator=generator)


EXPERT_SCHEMES = st.lists(schemes((2, 3, 4, 8, KEEP_WIDTH)), min_size=1, max_size=27)
MIXED = [
    Scheme(width=width, group_size=group)
    for width, group in [
        (2, 64), (2, 64), (3, 64), (4, 32), (8, 64), (KEEP_WIDTH, 64), (KEEP_WIDTH, 64), (3, 128), (2, 32),
        (3, 96), (3, 96), (KEEP_WIDTH, 64), (8, 128), (4, 128), (4, 64),
    ]
]  # fmt: skip


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


# --- what is not arithmetic --------------------------------------------------------------------------------------


class Untouchable:
    """Stands for the extension and fails where it would be called."""

    def __init__(self, real: object) -> None:
        self._real = real

    def linear(self, *args: object) -> None:
        raise AssertionError("addresses reached the native kernels")

    experts = linear

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


@needs_native
class TestWrongArguments:
    """Only addresses arrive in C++: what is wrong must stop before."""

    kernels = KERNELS["native"]

    @pytest.fixture(autouse=True)
    def untouchable(self, monkeypatch):
        monkeypatch.setattr(native, "_native", Untouchable(native._native))

    @pytest.mark.parametrize(
        "x",
        [
            torch.ones(3, 99), torch.ones(3, 101), torch.ones(3, 0), torch.ones(100, 3), torch.ones(0, 99),
            torch.ones(3, 100).half(), torch.ones(3, 100).double(), torch.ones(3, 100, dtype=torch.int64),
            torch.ones(3, 100, dtype=torch.int8), torch.ones(3, 100, device="meta"),
        ],
        ids=lambda x: f"{x.dtype}-{tuple(x.shape)}-{x.device}",
    )  # fmt: skip
    def test_inputs_of_a_linear(self, x):
        with pytest.raises(ValueError, match="100 float32 or bfloat16 inputs"):
            self.kernels.linear(make_matrix(Scheme(width=3), (40, 100), 0).matrix, x)

    def test_a_single_number_is_no_row(self):
        with pytest.raises(ValueError, match="inputs"):
            self.kernels.linear(make_matrix(Scheme(width=3), (40, 1), 0).matrix, torch.tensor(1.0))

    @pytest.mark.parametrize(
        "bias", [torch.ones(39), torch.ones(41), torch.ones(0), torch.ones(1, 39), torch.ones(40, device="meta")],
        ids=lambda bias: f"{tuple(bias.shape)}-{bias.device}",
    )  # fmt: skip
    def test_the_bias_of_a_linear(self, bias):
        with pytest.raises(ValueError, match="bias"):
            self.kernels.linear(make_matrix(Scheme(width=3), (40, 100), 0).matrix, torch.ones(3, 100), bias)

    @pytest.mark.parametrize(
        "change",
        [
            {"x": torch.ones(5, 71)}, {"x": torch.ones(5, 72).half()}, {"x": torch.ones(5, 72).double()},
            {"x": torch.ones(5, 1, 72)}, {"x": torch.ones(72)}, {"x": torch.ones(4, 72)}, {"x": torch.ones(6, 72)},
            {"x": torch.ones(5, 72, device="meta")},
            {"index": torch.zeros(5, 3, dtype=torch.long)}, {"index": torch.zeros(4, 2, dtype=torch.long)},
            {"index": torch.zeros(2, 5, dtype=torch.long)}, {"index": torch.zeros(10, dtype=torch.long)},
            {"index": torch.zeros(5, 2, dtype=torch.long, device="meta")},
            {"weights": torch.ones(5, 1)}, {"weights": torch.ones(6, 2)}, {"weights": torch.ones(5)},
            {"weights": torch.ones(5, 2, device="meta")},
        ],
        ids=lambda change: "-".join(f"{n}-{t.dtype}-{tuple(t.shape)}-{t.device}" for n, t in change.items()),
    )  # fmt: skip
    def test_of_experts(self, change):
        layer = make_layer(MIXED, 72, 40)
        given = {"x": torch.ones(5, 72), "index": torch.zeros(5, 2, dtype=torch.long), "weights": torch.ones(5, 2)}
        with pytest.raises(ValueError):  # noqa: PT011  (each case says something else)
            self.kernels.experts(layer.stack, **(given | change))

    @pytest.mark.parametrize(
        "change",
        [
            {"gate_bias": torch.ones(4, 40)}, {"gate_bias": torch.ones(5, 39)}, {"up_bias": torch.ones(5, 72)},
            {"gate_bias": torch.ones(5, 40).bfloat16()}, {"down_bias": torch.ones(72, 5).T},
            {"down_bias": torch.ones(5, 40)}, {"down_bias": torch.ones(5, 72, device="meta")},
        ],
        ids=lambda change: "-".join(f"{n}-{t.dtype}-{tuple(t.shape)}-{t.device}" for n, t in change.items()),
    )  # fmt: skip
    def test_biases_of_a_stack(self, change):
        layer = make_layer(MIXED, 72, 40)
        x, index, weights = make_tokens(layer, 5, 2)
        with pytest.raises(ValueError, match="bias"):
            self.kernels.experts(replace(layer.stack, **change), x, index, weights)

    def test_matrices_of_a_stack(self):
        layer, other = make_layer(MIXED, 72, 40), make_layer(MIXED, 64, 40)
        x, index, weights = make_tokens(layer, 5, 2)
        stack = layer.stack
        for change in (
            {"up": other.stack.up},
            {"down": other.stack.down},
            {"down": stack.gate},
            {"gate": [*stack.gate[:4], other.stack.gate[4]]},
            {"up": stack.up[:4]},
            {"down": stack.down[:4]},
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                self.kernels.experts(replace(stack, **change), x, index, weights)

    def test_a_matrix_that_is_elsewhere(self):
        matrix = make_matrix(Scheme(width=3), (40, 100), 0).matrix.to("meta")
        with pytest.raises(ValueError, match="CPU"):
            self.kernels.linear(matrix, torch.ones(3, 100))


class TestFinding:
    def test_by_name(self):
        assert {name: find_kernels(name).name for name in KERNELS if KERNELS[name].unusable(CPU) is None} == {
            runner.kernels.name: runner.kernels.name for runner in RUNNERS
        }
        assert find_kernels().unusable(CPU) is None
        assert find_kernels("auto", "meta").unusable(torch.device("meta")) is None

    @pytest.mark.parametrize("name", ["", "fast", "Native", "reference "])
    def test_an_unknown_name(self, name):
        with pytest.raises(MoqaError, match=r"no kernels named .*choose auto.*reference"):
            find_kernels(name)

    @needs_native
    def test_that_do_not_run_there(self):
        with pytest.raises(MoqaError, match="'native' do not run on meta: they are for the CPU"):
            find_kernels("native", "meta")

    def test_that_were_not_built(self, monkeypatch):
        monkeypatch.setattr(native, "_native", None)
        monkeypatch.setattr(native, "_missing", "no module", raising=False)
        with pytest.raises(MoqaError, match="not built"):
            find_kernels("native")
        assert find_kernels().name != "native"

    @needs_native
    def test_an_unknown_path(self):
        with pytest.raises(ValueError, match="no path abacus"):
            native.use_path("abacus")


@each_runner
class TestModules:
    """A kernel may remember where a matrix lies: nothing that a user does to a module may make that a lie."""

    x = make_rows(5, 100, FLOAT, 3)

    def used(self, runner: Runner, seed: int = 0) -> tuple[PackedLinear, Tensor]:
        """A module that has computed once, and what."""
        matrix = make_matrix(Scheme(width=3), (40, 100), seed).matrix
        module = PackedLinear(matrix, make_bias(40, seed), runner.kernels)
        return module, module(self.x)

    def test_another_dtype_keeps_what_is_stored(self, runner):
        module, before = self.used(runner)
        stored = {name: tensor.clone() for name, tensor in module.matrix.state_dict().items()}
        for dtype in (torch.float64, torch.float16, BFLOAT, FLOAT):
            module.to(dtype)
            for name, tensor in module.matrix.state_dict().items():
                assert tensor.dtype == stored[name].dtype
                assert torch.equal(tensor, stored[name])
        assert torch.allclose(module(self.x), before, atol=0.1)  # the bias was rounded

    def test_a_copy_has_memory_of_its_own(self, runner):
        module, before = self.used(runner)
        twin = copy.deepcopy(module)
        for tensor in module.matrix.buffers():
            tensor.zero_()
        assert torch.equal(twin(self.x), before)
        assert torch.equal(module(self.x), module.bias.expand(5, 40))

    def test_a_copy_outlives_its_original(self, runner):
        module, before = self.used(runner)
        twin = copy.deepcopy(module)
        del module
        filler = [torch.full((3 * 4 * 128,), 255, dtype=torch.uint8) for _ in range(50)]
        assert torch.equal(twin(self.x), before)
        del filler

    def test_pickled(self, runner):
        module, before = self.used(runner)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(self.x), before)

    @pytest.mark.parametrize("assign", [False, True])
    def test_other_weights_are_used(self, runner, assign):
        module, before = self.used(runner)
        other, wanted = self.used(runner, seed=1)
        old = list(module.matrix.buffers())  # stays in memory: what was there would be read, not garbage
        module.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)
        assert torch.equal(module(self.x), wanted)
        assert not torch.equal(wanted, before)
        del old

    def test_moved_tensors_are_used(self, runner):
        module, before = self.used(runner)
        old = list(module.matrix.buffers())
        module._apply(torch.clone)
        for tensor in old:
            tensor.zero_()
        assert torch.equal(module(self.x), before)
        module.share_memory()
        assert torch.equal(module(self.x), before)

    def test_a_replaced_buffer_is_used(self, runner):
        module, _ = self.used(runner)
        other, wanted = self.used(runner, seed=1)
        old = list(module.matrix.buffers())
        for name, tensor in other.matrix.named_buffers():
            setattr(module.matrix, name, tensor.clone())
        module.bias = other.bias
        assert torch.equal(module(self.x), wanted)
        del old

    def test_experts_follow_their_matrices(self, runner):
        def used(seed: int) -> tuple[PackedExperts, Callable[[], Tensor]]:
            layer = make_layer(MIXED, 72, 40, seed=seed)
            owner = SimpleNamespace(
                num_experts=5, is_transposed=False, is_concatenated=True, has_bias=False,
                gate_up_proj=torch.empty(5, 80, 72),
                _apply_gate=lambda both: silu(both[..., : both.shape[-1] // 2]) * both[..., both.shape[-1] // 2 :],
            )  # fmt: skip
            matrices = {
                (expert, f"{name}_proj"): known.matrix
                for name in ("gate", "up", "down")
                for expert, known in enumerate(getattr(layer, name))
            }
            module = PackedExperts(owner, matrices, runner.kernels)
            tokens = make_tokens(layer, 5, 2)
            return module, lambda: module.run(owner, *tokens)

        (module, run), (other, run_other) = used(0), used(100)
        before, wanted = run(), run_other()
        assert not torch.equal(before, wanted)
        old = list(module.buffers())
        module._apply(torch.clone)
        assert torch.equal(run(), before)
        module.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
        assert torch.equal(run(), wanted)
        del old


@dataclass
class Work:
    """A linear layer and experts that are enough for several threads, with what they give."""

    runner: Runner
    known: Known
    layer: Layer
    given: tuple

    def do(self) -> list[Tensor]:
        x, *tokens = self.given
        return [self.runner.linear(self.known.matrix, x), self.runner.experts(self.layer.stack, *tokens)]


@pytest.fixture
def work(runner) -> Work:
    torch.set_num_threads(2)
    known, layer = make_matrix(Scheme(width=4), (300, 400), 0), make_layer(MIXED, 72, 300)
    return Work(runner, known, layer, (make_rows(50, 400, FLOAT, 0), *make_tokens(layer, 40, 2)))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@each_quantizing
def test_callers_on_several_threads_do_not_disturb_each_other(work):
    wanted = work.do()
    with ThreadPoolExecutor(4) as pool:
        assert all(same(found, wanted) for found in pool.map(lambda _: work.do(), range(40)))


@each_quantizing
def test_idle_threads_use_no_processor(work):
    work.do()
    # a busy machine may take its time to let them find that there is nothing to do
    assert any(_processor_time(0.5) < 0.05 for _ in range(200))


def _processor_time(seconds: float) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def _in_child(send, work: Work) -> None:
    torch.set_num_threads(2)
    send.send([tensor.tolist() for tensor in work.do()])


@each_quantizing
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_forked_child_computes_the_same(work, busy):
    """Threads and what they hold do not survive a fork: a child that waited for its parent's would hang."""
    wanted, context = work.do(), multiprocessing.get_context("fork")
    large = make_matrix(Scheme(width=4), (800, 800), 0).matrix, make_rows(400, 800, FLOAT, 0)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(send, work))
    forked, computes = threading.Event(), threading.Event()

    def compute() -> None:
        while not forked.is_set():
            work.runner.linear(*large)
            computes.set()

    with ThreadPoolExecutor(1) as pool:
        if busy:
            pool.submit(compute)
            assert computes.wait(120)
        child.start()
        forked.set()
    try:
        assert receive.poll(120), "the child hangs"
        found = receive.recv()
        child.join(120)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert same([torch.tensor(tensor) for tensor in found], wanted)
    assert same(work.do(), wanted)  # and the parent's threads are as they were
