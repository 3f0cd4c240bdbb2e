"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter; and that they compile for GPUs.

Triton decides when it is imported whether it interprets, so one test here runs the others in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exact import CODED, GROUPS, SCALES, make_matrix
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moqa.format.grid import to_groups
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.kernels import ACTIVATIONS, ExpertStack, PackedMatrix
from moqa.kernels.reference import activate
from moqa.kernels.triton import TritonKernels
from moqa.methods.grid import fit_grid

kernels = TritonKernels()
# no search for a smaller example: interpreted, it takes minutes
PHASES = (Phase.explicit, Phase.generate)
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
runs_here = pytest.mark.skipif(
    kernels.unusable(DEVICE) is not None, reason="runs in Triton's interpreter, see the file"
)


@pytest.mark.skipif(kernels.unusable(DEVICE) is None, reason="it starts this process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_others_in_tritons_interpreter(chosen):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", chosen, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_importing_them_does_not_import_triton():
    script = "import sys, moqa.kernels.triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_says_why_it_does_not_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPU" in str(kernels.unusable(torch.device("cpu")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unusable(torch.device("cpu")) is None
    monkeypatch.setattr("moqa.kernels.triton.find_spec", lambda name: None)
    assert "pip install 'moqa[gpu]'" in str(kernels.unusable(torch.device("cpu")))


def make(shape, scheme, scale=1.0):
    weight = torch.randn(shape) * scale
    if scheme.is_unquantized:
        return PackedMatrix(scheme, shape, {"weight": weight.bfloat16()})
    if scheme.is_coded:
        return make_matrix(scheme, shape, int(torch.randint(10**6, ())), scale).matrix
    grid = fit_grid(weight, scheme).grid
    planes = pack(grid.encode(weight), scheme.width)
    return PackedMatrix(scheme, shape, grid.stored(planes))


def expected(matrix, x, bias=None):
    """[rows, out] float64 of quantized activations, and the largest that rounding one of them changes."""
    dense, step = matrix.dense().double(), 0.0
    if not matrix.scheme.is_unquantized:
        groups = to_groups(x.float(), matrix.scheme.group_size)
        scale = groups.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(scale >= 1e-36, 1 / scale, 0)
        x = ((groups * inverse).round().double() * scale.double()).flatten(-2)[..., : x.shape[-1]]
        step = float(scale.max() * dense.abs().max())
    y = x.double() @ dense.T
    return (y if bias is None else y + bias.double()), step


def check(y, wanted):
    # the interpreter cuts float32 to bfloat16 where a GPU rounds
    atol, rtol = 2e-5 * float(wanted.abs().max()) + 1e-30, 8e-3 if y.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(y.cpu().double(), wanted, atol=atol, rtol=rtol)


def same(y, wanted, exactly):
    # the interpreter's products of floats are numpy's, whose order depends on the number of rows
    assert torch.equal(y, wanted) if exactly else torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)


schemes = st.builds(
    lambda width, group, symmetric, dtype: Scheme(
        width=width, group_size=group, symmetric=symmetric and width > 1, scale_dtype=dtype
    ),
    st.sampled_from((*WIDTHS, 16)),
    st.sampled_from((32, 64, 96, 128, 160)),
    st.booleans(),
    st.sampled_from(SCALES),
)


def check_codes(scheme, group, shape, rows):
    torch.manual_seed(rows)
    scheme = scheme.model_copy(update={"group_size": group, "scale_dtype": SCALES[scheme.width % 2]})
    matrix, x = make(shape, scheme), torch.randn(rows, shape[1])
    wanted, _ = expected(matrix, x)
    check(kernels.linear(matrix.to(DEVICE), x.to(DEVICE)), wanted)


@runs_here
class TestLinear:
    @settings(max_examples=16, phases=PHASES)
    @given(
        schemes, st.integers(1, 40), st.integers(1, 300), st.sampled_from((1, 2, 3, 8, 11, 17, 40)), st.booleans(),
        st.booleans(), st.integers(0, 10**6),
    )  # fmt: skip
    def test_is_the_product_with_quantized_activations(self, scheme, out, features, rows, biased, half, seed):
        torch.manual_seed(seed)
        matrix, x = make((out, features), scheme), torch.randn(rows, features) * 10 ** torch.randn(rows, 1)
        x, bias = x.bfloat16() if half else x, torch.randn(out) if biased else None
        wanted, _ = expected(matrix, x, bias)
        y = kernels.linear(matrix.to(DEVICE), x.to(DEVICE), None if bias is None else bias.to(DEVICE))
        assert y.dtype == x.dtype
        check(y, wanted)

    @pytest.mark.parametrize("scheme", CODED, ids=str)
    def test_of_codes(self, scheme):
        check_codes(scheme, 64, (21, 70), 2)
        check_codes(scheme, 128, (40, 300), 20)

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 7, 30])
    @pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 520), (70, 300)], ids=str)
    @pytest.mark.parametrize("group", [*GROUPS, 160, 256])
    @pytest.mark.parametrize("scheme", CODED, ids=str)
    def test_of_codes_in_all_shapes(self, scheme, group, shape, rows):
        check_codes(scheme, group, shape, rows)

    def test_factors_are_aligned_to_four_bytes_as_in_a_file(self):
        matrix, x = make((20, 300), CODED[-1]).to(DEVICE), torch.randn(2, 300).to(DEVICE)
        wanted, factor = kernels.linear(matrix, x), matrix.factor
        matrix.factor = factor.new_empty(factor.numel() + 4)[4:].view(factor.shape).copy_(factor)
        assert torch.equal(kernels.linear(matrix, x), wanted)

    @pytest.mark.parametrize(
        ("width", "group", "encoding"),
        [(2, 32, "int"), (7, 96, "int"), (8, 64, "int"), (16, 64, "int"), (4, 64, "table"), (3, 128, "trellis")],
    )
    def test_a_row_does_not_depend_on_the_rows_beside_it(self, width, group, encoding):
        torch.manual_seed(width)
        scheme = Scheme(width=width, group_size=group, encoding=encoding)
        matrix, x = make((20, 500), scheme).to(DEVICE), torch.randn(70, 500).to(DEVICE)
        whole = kernels.linear(matrix, x)
        for rows in (1, 5, 20):
            same(kernels.linear(matrix, x[:rows]), whole[:rows], exactly=width < 16)

    @pytest.mark.parametrize("rows", [4, 20])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_rows_that_are_lost_say_so_and_others_do_not_care(self, rows, bad):
        matrix, x = make((20, 100), Scheme(width=4)).to(DEVICE), torch.randn(rows, 100).to(DEVICE)
        wanted = kernels.linear(matrix, x)
        x[1, 77] = bad
        y = kernels.linear(matrix, x)
        assert y[1].isnan().all()
        assert torch.equal(y[2:], wanted[2:])

    def test_zeros_tiny_and_huge_inputs(self):
        matrix, x = make((20, 100), Scheme(width=4)), torch.randn(3, 100) * torch.tensor([[0.0], [1e-39], [1e30]])
        y = kernels.linear(matrix.to(DEVICE), x.to(DEVICE))
        assert not y[:2].any()
        assert y.isfinite().all()

    def test_shapes_and_what_is_refused(self):
        matrix = make((20, 100), Scheme(width=4)).to(DEVICE)
        assert kernels.linear(matrix, torch.zeros(2, 3, 100, device=DEVICE)).shape == (2, 3, 20)
        assert kernels.linear(matrix, torch.zeros(0, 100, device=DEVICE)).shape == (0, 20)
        assert kernels.linear(matrix, torch.zeros(100, device=DEVICE)).shape == (20,)
        for x in (torch.zeros(2, 99), torch.zeros(2, 100).double()):
            with pytest.raises(ValueError, match="a row has 100"):
                kernels.linear(matrix, x.to(DEVICE))
        with pytest.raises(ValueError, match="bias"):
            kernels.linear(matrix, torch.zeros(2, 100, device=DEVICE), torch.zeros(19, device=DEVICE))

    def test_a_matrix_that_changes_is_prepared_anew(self):
        matrix, other = (make((20, 100), Scheme(width=4)).to(DEVICE) for _ in range(2))
        x = torch.randn(2, 100).to(DEVICE)
        kernels.linear(matrix, x)
        matrix.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(kernels.linear(matrix, x), kernels.linear(other, x))


def make_stack(schemes, experts, hidden, width, activation, biased):
    def part(shape, shift):
        return [make(shape, schemes[(e + shift) % len(schemes)], shape[1] ** -0.5) for e in range(experts)]

    biases = [torch.randn(experts, size) if biased else None for size in (width, width, hidden)]
    return ExpertStack(
        part((width, hidden), 0), part((width, hidden), 1), part((hidden, width), 2), activation, *biases
    )


def on_device(stack):
    gate, up, down = ([matrix.to(DEVICE) for matrix in part] for part in (stack.gate, stack.up, stack.down))
    biases = (None if b is None else b.to(DEVICE) for b in (stack.gate_bias, stack.up_bias, stack.down_bias))
    return ExpertStack(gate, up, down, stack.activation, *biases)


def expected_experts(stack, x, index, weights):
    """[tokens, hidden] float64, and by how much an activation that rounds the other way may change each."""
    total, slack = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(len(x), 1, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if not 0 <= expert < len(stack.gate):
                continue
            biases = [None if b is None else b[expert] for b in (stack.gate_bias, stack.up_bias, stack.down_bias)]
            gate, _ = expected(stack.gate[expert], x[token : token + 1], biases[0])
            up, _ = expected(stack.up[expert], x[token : token + 1], biases[1])
            down, step = expected(stack.down[expert], activate(stack.activation, gate, up).float(), biases[2])
            total[token] += share * down[0]
            slack[token] += abs(share) * step
    return total, slack


def check_experts(stack, x, index, weights):
    wanted, slack = expected_experts(stack, x, index, weights)
    y = kernels.experts(on_device(stack), x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)).cpu().double()
    is_half = x.dtype == torch.bfloat16
    error, bound = (y - wanted).abs(), 2e-5 * wanted.abs().max() + (8e-3 * wanted.abs() if is_half else 0)
    assert (error <= bound + slack).all()
    # hardly any activation lies where its rounding is open
    assert ((error > bound).any(-1)).sum() <= 1


# encodings, widths and group sizes as a plan may mix them
MIXED = (
    Scheme(encoding="trellis", width=3), Scheme(width=5, group_size=32), Scheme(encoding="table", width=4),
    Scheme(encoding="trellis", width=2, group_size=128), Scheme(encoding="table", width=1, group_size=32),
    Scheme(encoding="trellis", width=1), Scheme(width=16),
)  # fmt: skip


@runs_here
class TestExperts:
    @settings(max_examples=6, phases=PHASES)
    @given(
        st.lists(schemes, min_size=1, max_size=4), st.sampled_from(ACTIVATIONS), st.integers(1, 3), st.integers(1, 32),
        st.integers(1, 40), st.sampled_from((1, 7)), st.integers(1, 3), st.booleans(), st.booleans(),
        st.integers(0, 10**6),
    )  # fmt: skip
    def test_are_the_weighted_sum(self, schemes, activation, experts, hidden, width, tokens, top_k, biased, half, seed):
        torch.manual_seed(seed)
        stack = make_stack(schemes, experts, hidden, width, activation, biased)
        x = torch.randn(tokens, hidden)
        x, weights = x.bfloat16() if half else x, torch.rand(tokens, top_k)
        # one past the last expert means none
        index = torch.randint(experts + 1, (tokens, top_k))
        check_experts(stack, x, index, weights)

    @pytest.mark.parametrize(("tokens", "mixed"), [(3, MIXED[:-1]), (8, MIXED), (15, MIXED[:-1])])
    def test_of_mixed_encodings(self, tokens, mixed):
        torch.manual_seed(tokens)
        stack = make_stack(mixed, len(mixed), 12, 16, "silu", False)
        index = (torch.arange(2 * tokens) % len(mixed)).view(tokens, 2)
        check_experts(stack, torch.randn(tokens, 12), index, torch.rand(tokens, 2))

    @pytest.mark.parametrize("schemes", [(2, 3), (8,), (16, 5)], ids=str)
    def test_a_token_does_not_depend_on_the_tokens_beside_it(self, schemes):
        torch.manual_seed(0)
        stack = on_device(make_stack([Scheme(width=w) for w in schemes], 5, 30, 16, "silu", False))
        x, weights = torch.randn(60, 30).to(DEVICE), torch.rand(60, 2).to(DEVICE)
        index = torch.stack([torch.randperm(5)[:2] for _ in range(60)]).to(DEVICE)
        whole = kernels.experts(stack, x, index, weights)
        for tokens in (2, 17):
            some = kernels.experts(stack, x[:tokens], index[:tokens], weights[:tokens])
            same(some, whole[:tokens], exactly=16 not in schemes)

    @pytest.mark.parametrize("tokens", [2, 30])
    def test_a_lost_token_is_lost_alone(self, tokens):
        stack = on_device(make_stack([Scheme(width=3)], 3, 16, 16, "swiglu_clamped", False))
        x, weights = torch.randn(tokens, 16).to(DEVICE), torch.rand(tokens, 2).to(DEVICE)
        index = torch.tensor([[0, 1]]).expand(tokens, 2).to(DEVICE)
        wanted = kernels.experts(stack, x, index, weights)
        x[0, 3] = float("nan")
        y = kernels.experts(stack, x, index, weights)
        assert y[0].isnan().all()
        assert torch.equal(y[1:], wanted[1:])

    def test_tokens_without_experts_are_zero(self):
        stack = on_device(make_stack([Scheme(width=3)], 3, 40, 32, "silu", True))
        for tokens, top_k in ((0, 2), (2, 0), (2, 2), (20, 2)):
            index = torch.full((tokens, top_k), 3).to(DEVICE)
            y = kernels.experts(stack, torch.randn(tokens, 40).to(DEVICE), index, torch.rand(index.shape).to(DEVICE))
            assert y.shape == (tokens, 40)
            assert not y.any()

    def test_one_bias_of_two_and_what_is_refused(self):
        torch.manual_seed(0)
        stack = make_stack([Scheme(width=4)], 2, 40, 32, "silu", True)
        stack.gate_bias = None
        x, index, weights = torch.randn(3, 40), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
        wanted, slack = expected_experts(stack, x, index, weights)
        stack = on_device(stack)
        y = kernels.experts(stack, x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
        assert ((y.cpu() - wanted).abs() <= 1e-4 + slack).all()
        with pytest.raises(ValueError, match="index"):
            kernels.experts(stack, x.to(DEVICE), index[:2].to(DEVICE), weights[:2].to(DEVICE))
        stack.prepared, stack.down_bias = None, torch.zeros(2, 39).to(DEVICE)
        with pytest.raises(ValueError, match="bias"):
            kernels.experts(stack, x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))


def compile_launches(capability):
    """Compile what the kernels launch, for a GPU that need not be here; runs in a process of its own."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    import moqa.kernels.triton as launcher
    from moqa.kernels import triton_ops

    class Elsewhere:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def compiled(*arguments, **options):
                kernel = getattr(triton_ops, self.name).run(*arguments, grid=grid, warmup=True, **options)
                assembly.setdefault(self.name, []).append(kernel.asm["ptx"])

            return compiled

    driver.set_active(Elsewhere())
    assembly = {}
    launcher._ops = lambda: SimpleNamespace(**{n: Launch(n) for n in ("quantize", "few", "many", "combine")})
    for width, group, rows in ((7, 64, (1, 8, 64)), (8, 128, (20,)), (1, 96, (2, 20)), (16, 64, (20,))):
        matrix = make((40, 200), Scheme(width=width, group_size=group, symmetric=width == 8))
        for count in rows:
            kernels.linear(matrix, torch.zeros(count, 200), torch.zeros(40))
    kernels.linear(matrix, torch.zeros(20, 200).bfloat16())
    for scheme in CODED:
        matrix = make((40, 200), scheme)
        for count in (1, 8, 20):
            kernels.linear(matrix, torch.zeros(count, 200))
            name = "many" if count == 20 else "few"
            assert "prmt.b32" in assembly[name][-1]
    stack = make_stack([Scheme(width=2), Scheme(width=3, group_size=32), MIXED[0]], 4, 64, 64, "gelu", True)
    for tokens in (1, 40):
        kernels.experts(stack, torch.zeros(tokens, 64), torch.zeros(tokens, 2).long(), torch.zeros(tokens, 2))
    assert all("dp4a.u32.s32" in ptx for ptx in assembly["few"])
    assert all("mma" in ptx for ptx in assembly["many"])
    assert all(f".target sm_{capability}" in ptx for found in assembly.values() for ptx in found)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="an interpreter compiles nothing")
@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 86, 89, 100, 120))]
)
def test_all_launches_compile(capability, tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import test_kernels_triton as here; here.compile_launches({capability})"],
        env=os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
