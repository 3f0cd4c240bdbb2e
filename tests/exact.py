"""Packed matrices, layers of experts, and their products in double precision with bounds on the rounding allowed.

Kernels that quantize activations (`QUANTIZING`) are held to the same quantization in double precision, and to what it
may cost against exact inputs. Every bound here is derived, none is fitted: what exceeds it is a wrong number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, silu

from moqa.format.grid import from_groups, to_groups
from moqa.format.levels import pack_factors
from moqa.format.planes import pack, tile_rows
from moqa.format.scheme import DEFAULT_ENCODING as INTEGERS
from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH, WIDTHS
from moqa.kernels import KERNELS, ExpertStack, PackedMatrix, ProductKernels, native

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

    kernels: ProductKernels
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


# --- matrices and the double-precision truth ---------------------------------------------------------------------


@dataclass
class Known:
    """A packed matrix with its weights in double precision.

    `weights` is s (q - o), and `terms` s (q + o): what is added up where a kernel takes the zero-point out of the sum.
    Of codes, s is scale times factor, q the level above -64, and o is 64.
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
    if scheme.is_coded:
        return make_coded(scheme, shape, generator, size)
    top, groups = 2**scheme.width - 1, -(-features // scheme.group_size)
    integers = torch.randint(0, 2**scheme.width, shape, generator=generator, dtype=torch.uint8)
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


# the upper halves of the levels of codes, by width
LEVELS = {
    "table": {1: [63], 2: [19, 63], 3: [7, 22, 39, 63], 4: [3, 9, 15, 22, 29, 37, 48, 63]},
    "trellis": {1: [19, 63], 2: [6, 21, 36, 63], 3: [3, 8, 14, 20, 27, 35, 46, 63]},
}


def level_of(scheme: Scheme, codes: Tensor) -> Tensor:
    """Level of each of [out, in] codes, int64; of a trellis row by row, as docs/format.md tells it."""
    upper = LEVELS[scheme.encoding][scheme.width]
    known, index = torch.tensor([-level for level in reversed(upper)] + upper), codes.long()
    if scheme.encoding == "trellis":
        out, features = codes.shape
        # rows that fill up the last tile have code 0, and those above the first are the last ones
        tall = -(-out // 16) * 16
        coded = torch.cat([codes.long() % 2, torch.zeros(tall - out, features, dtype=torch.int64)])
        for row in range(out):
            c, c1, c2 = coded[row], coded[(row - 16) % tall], coded[(row - 32) % tall]
            index[row] = 4 * (index[row] // 2) + 2 * (c != c2) + c1
    return known[index]


def make_coded(scheme: Scheme, shape: tuple[int, int], generator: torch.Generator, size: float) -> Known:
    """Any codes, scales and factors: each is allowed."""
    out, features = shape
    groups = -(-features // scheme.group_size)
    codes = torch.randint(0, 2**scheme.width, shape, generator=generator, dtype=torch.uint8)
    factor = torch.randint(0, 64, (out, groups), generator=generator, dtype=torch.uint8)
    # rows of one code and of the largest factor are where sums are largest
    edge = torch.randint(0, 6, (out, 1), generator=generator)
    codes = torch.where(edge == 0, 2**scheme.width - 1, torch.where(edge == 1, 0, codes)).to(torch.uint8)
    factor = torch.where(edge <= 1, 63, factor).to(torch.uint8)
    scale = 2.0 ** (torch.rand(out, generator=generator) * 4 - 3) * size / 63**2
    scale[torch.rand(out, generator=generator) < 0.02] = 0.0
    scale = scale.to(getattr(torch, scheme.scale_dtype))
    tensors = {f"p{index}": plane for index, plane in enumerate(pack(codes, scheme.width))}
    tensors |= {"scale": tile_rows(scale[:, None])[:, 0].contiguous(), "factor": pack_factors(factor)}
    steps = (scale.double()[:, None] * factor)[..., None]
    level = to_groups(level_of(scheme, codes).double(), scheme.group_size)
    weights, terms = from_groups(steps * level, features), from_groups(steps * (level + 128), features)
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


SCALES = ("bfloat16", "float16")
CODED = [Scheme(width=width, encoding=encoding) for encoding, known in LEVELS.items() for width in known]
SCHEMES = [
    Scheme(width=width, group_size=group, symmetric=symmetric, scale_dtype=SCALES[place % 2])
    for place, (width, group, symmetric) in enumerate(
        (w, g, s) for w in (*WIDTHS, KEEP_WIDTH) for g in GROUPS for s in (False, True) if not (s and w == 1)
    )
] + [s.model_copy(update={"group_size": g, "scale_dtype": d}) for s in CODED for g in (*GROUPS, 256) for d in SCALES]


def each_scheme(*widths: int) -> pytest.MarkDecorator:
    """Of integers with these widths, and of codes."""
    found = [Scheme(width=width) for width in widths] + CODED
    return pytest.mark.parametrize("scheme", found, ids=lambda s: f"{s.storage.name}-{s.width}")


def schemes(widths: tuple[int, ...] = (*WIDTHS, KEEP_WIDTH)) -> st.SearchStrategy[Scheme]:
    group, scale = st.sampled_from((*GROUPS, 256)), st.sampled_from(SCALES)
    integers = st.builds(
        lambda width, group, symmetric, scale: Scheme(
            width=width, group_size=group, symmetric=symmetric and width > 1, scale_dtype=scale
        ),
        st.sampled_from(widths), group, st.booleans(), scale,
    )  # fmt: skip
    codes = st.builds(
        lambda kind, group, scale: kind.model_copy(update={"group_size": group, "scale_dtype": scale}),
        st.sampled_from(CODED), group, scale,
    )  # fmt: skip
    return st.one_of(integers, integers, codes)


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
    Scheme(width=width, group_size=group, encoding=encoding)
    for width, group, encoding in [
        (2, 64, INTEGERS), (2, 64, "trellis"), (3, 64, INTEGERS),
        (4, 32, INTEGERS), (8, 64, INTEGERS), (KEEP_WIDTH, 64, INTEGERS),
        (KEEP_WIDTH, 64, INTEGERS), (3, 128, "table"), (2, 32, "trellis"),
        (3, 96, INTEGERS), (3, 96, INTEGERS), (KEEP_WIDTH, 64, INTEGERS),
        (1, 128, "trellis"), (4, 128, INTEGERS), (4, 64, "table"),
    ]
]  # fmt: skip
