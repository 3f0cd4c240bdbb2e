"""What every quantization method must do, whoever adds it, with plenty of data, little, none and degenerate data."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from exact import CODED, LEVELS

from moqa.calibration.inputs import InputStatistics, input_space
from moqa.format.planes import unpack, untile_rows
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.kernels import PackedMatrix
from moqa.methods import METHODS, SolveBatch
from moqa.methods.gptq import damping
from moqa.models.units import Unit
from moqa.quantization.pieces import BlockPiece, quantize_piece

SHAPES = [(40, 100), (16, 64), (3, 130)]
each_method = pytest.mark.parametrize("method", sorted(METHODS))
needs_data = pytest.mark.parametrize("method", sorted(name for name, found in METHODS.items() if found.needs_data))


def correlated(tokens, features, seed, rank=None):
    """[tokens, features] inputs with a few strong directions and some loud features, as in a real model."""
    shared = torch.Generator().manual_seed(99)
    spectrum = torch.logspace(0.5, -1.5, features)
    if rank is not None:
        spectrum[rank:] = 0
    mix = torch.linalg.qr(torch.randn(features, features, generator=shared))[0] * spectrum[:, None]
    loud = torch.rand(features, generator=shared).pow(-0.5)
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) @ mix * loud


def inputs_of(tokens, features, seed=0, rank=None, check=2000):
    seen = InputStatistics(features)
    if tokens:
        seen.add(correlated(tokens, features, seed, rank), 1 / tokens, check=False)
    if check:
        seen.add(correlated(check, features, seed + 1, rank), 1 / check, check=True)
    return seen


def make_job(shape, widths=WIDTHS, tokens=4000, **options):
    torch.manual_seed(5)
    weights = torch.randn(len(widths), *shape) * 0.1
    rows = torch.tensor(widths)[:, None].expand(len(widths), shape[0])
    seen = [inputs_of(tokens, shape[1], seed, **options) for seed in range(0, 2 * len(widths), 2)]
    return SolveBatch(weights, rows, seen, Scheme(width=8), shape[:1])


def degenerate(inputs, case):
    """Make of some inputs what the case says."""
    for seen in inputs:
        if case in ("none", "zero"):
            seen.fit = torch.zeros_like(seen.fit)
            seen.tokens = 0 if case == "none" else 500
        elif case == "one token":
            x = correlated(1, len(seen.fit), 0)
            seen.fit, seen.tokens = x.T @ x, 1
        elif case == "dead features":
            gram = seen.fit
            gram[:40] = gram[:, :40] = 0
            seen.fit = gram
        elif case == "tiny":
            seen.fit *= 1e-30
        elif case == "huge":
            seen.fit *= 1e30


def run(method, job):
    found = METHODS[method]
    return found.run(job if found.needs_data else SolveBatch(job.weights, job.widths, [], job.scheme, job.parts))


def relative_error(result, weights):
    return (result.decode() - weights).square().sum((1, 2)) / weights.square().sum((1, 2))


def relative_output_error(result, job):
    energies = [
        torch.stack([((one @ inputs.fit) * one).sum() for one, inputs in zip(weights, job.inputs, strict=True)])
        for weights in (result.decode() - job.weights, job.weights)
    ]
    return energies[0] / energies[1]


@each_method
class TestEveryMethod:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_integers_and_grids_are_what_is_stored(self, method, shape):
        job = make_job(shape)
        result = run(method, job)
        assert result.integers.dtype == torch.uint8
        assert result.integers.shape == job.weights.shape
        for entry, width in enumerate(WIDTHS):
            assert int(result.integers[entry].max()) < 2**width
            assert (result.grid.scale.dtype, result.grid.zero.dtype) == (torch.bfloat16, torch.uint8)
            assert result.grid.scale[entry].shape == result.grid.zero[entry].shape == (shape[0], -(-shape[1] // 64))
        assert result.decode().isfinite().all()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_weights_stay_close_and_more_bits_are_better(self, method, shape):
        job = make_job(shape, tokens=400)
        job.weights[:] = job.weights[0].clone()
        job.inputs[:] = job.inputs[:1] * len(WIDTHS)
        errors = relative_error(run(method, job), job.weights)
        assert (errors[1:] < errors[:-1]).all()
        assert errors[0] < 1.5
        assert errors[3] < 0.05
        assert errors[7] < 2e-4

    def test_is_deterministic(self, method):
        first, second = (run(method, make_job((40, 100))) for _ in range(2))
        assert torch.equal(first.integers, second.integers)
        assert torch.equal(first.grid.scale, second.grid.scale)
        assert torch.equal(first.grid.zero, second.grid.zero)

    def test_a_stack_is_solved_as_its_parts_are(self, method):
        job = make_job((40, 100))
        whole = run(method, job)
        for entry in (1, 4):
            at = slice(entry, entry + 1)
            alone = run(method, SolveBatch(job.weights[at], job.widths[at], job.inputs[at], job.scheme, job.parts))
            assert torch.allclose(alone.decode()[0], whole.decode()[entry], atol=1e-6)

    @pytest.mark.parametrize("scheme", [Scheme(width=8, symmetric=True), Scheme(width=8, group_size=32)], ids=str)
    def test_any_scheme(self, method, scheme):
        job = make_job((24, 100), widths=(2, 3, 4, 8))
        result = run(method, SolveBatch(job.weights, job.widths, job.inputs, scheme, job.parts))
        assert (result.grid.zero is None) == scheme.symmetric
        assert result.grid.scale.shape == (4, 24, -(-100 // scheme.group_size))
        assert (relative_error(result, job.weights) < torch.tensor([1.5, 0.3, 0.1, 1e-3])).all()

    @pytest.mark.parametrize("case", ["none", "zero", "one token", "rank 3", "dead features", "tiny", "huge"])
    def test_degenerate_inputs(self, method, case):
        job = make_job((16, 64), tokens=500, rank=3 if case == "rank 3" else None)
        degenerate(job.inputs, case)
        errors = relative_error(run(method, job), job.weights)
        assert (errors < torch.tensor([2.0, 0.9, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3])).all()

    def test_constant_weights(self, method):
        job = make_job((16, 64))
        job.weights.fill_(0.25)
        assert (relative_error(run(method, job), job.weights) < 0.01).all()
        job.weights.fill_(0.0)
        assert not run(method, job).decode().any()


def coded_job(schemes, shape=(40, 100), tokens=4000, **options):
    """A stack for each scheme; they share an encoding."""
    job = make_job(shape, tuple(scheme.width for scheme in schemes), tokens, **options)
    return replace(job, scheme=schemes[0])


each_encoding = pytest.mark.parametrize(
    "schemes", [[s for s in CODED if s.encoding == name] for name in LEVELS], ids=list(LEVELS)
)


@each_method
@each_encoding
class TestCodes:
    @pytest.mark.parametrize("parts", [(40,), (24, 16), (5, 30, 33)], ids=str)
    @pytest.mark.parametrize("group", [32, 64])
    def test_what_is_stored_is_what_is_decoded(self, method, schemes, parts, group):
        widths = [scheme.width for scheme in schemes]
        job = coded_job(schemes, (sum(parts), 100), tokens=300)
        of_part = torch.tensor([[widths[(entry + p) % len(widths)] for p in range(len(parts))] for entry in widths])
        rows = of_part.repeat_interleave(torch.tensor(parts), 1)
        scheme = schemes[0].model_copy(update={"group_size": group})
        result = run(method, replace(job, widths=rows, scheme=scheme, parts=parts))
        dense = result.decode()
        for entry, begin, count in ((e, sum(parts[:p]), n) for e in range(len(widths)) for p, n in enumerate(parts)):
            at = slice(begin, begin + count)
            mine = scheme.model_copy(update={"width": int(rows[entry, begin])})
            stored = result[entry, at].stored(mine.width)
            assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == mine.tensors((count, 100))
            assert torch.equal(PackedMatrix(mine, (count, 100), stored).dense(), dense[entry, at])

    def test_weights_stay_close_and_more_bits_are_better(self, method, schemes):
        job = coded_job(schemes, tokens=400)
        job.weights[:], job.inputs[:] = job.weights[0].clone(), job.inputs[:1] * len(schemes)
        result = run(method, job)
        errors, outputs = relative_error(result, job.weights), relative_output_error(result, job)
        assert (errors[1:] < errors[:-1]).all()
        assert (outputs[1:] < outputs[:-1]).all()
        # gptq moves weights far where that makes up for others
        assert errors[0] < 2.5
        assert errors[2] < 0.3
        assert outputs[0] < (0.2 if method.startswith("gptq") else 1.0)
        assert outputs[2] < (0.005 if method.startswith("gptq") else 0.1)

    def test_a_stack_is_solved_as_its_parts_are(self, method, schemes):
        job = coded_job(schemes, (60, 100))
        whole = run(method, replace(job, parts=(24, 36)))
        for entry in range(len(schemes)):
            one = slice(entry, entry + 1)
            for rows in (slice(0, 24), slice(24, 60)):
                part = replace(job, weights=job.weights[one, rows], widths=job.widths[one, rows],
                               inputs=job.inputs[one], parts=(rows.stop - rows.start,))  # fmt: skip
                assert torch.allclose(run(method, part).decode()[0], whole.decode()[entry, rows], atol=1e-6)

    @pytest.mark.parametrize("case", ["none", "one token", "rank 3", "tiny", "huge"])
    def test_degenerate_inputs(self, method, schemes, case):
        job = coded_job(schemes, (16, 64), tokens=500, rank=3 if case == "rank 3" else None)
        degenerate(job.inputs, case)
        errors = relative_error(run(method, job), job.weights)
        assert (errors < torch.tensor([2.0, 0.9, 0.3, 0.1])[: len(schemes)]).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("value", [0.0, 1e-42, 1e-20, 1.0, 1e4, 1e18, 1e30, 3e38])
    def test_strange_weights_are_numbers(self, method, schemes, value, dtype):
        job = coded_job(schemes, (40, 100), tokens=300)
        job.weights.fill_(value)
        job.weights[:, 3] = value * torch.linspace(-1, 1, 100)
        job.weights[:, 5] = 0.0
        scheme = schemes[0].model_copy(update={"scale_dtype": dtype})
        result = run(method, replace(job, scheme=scheme))
        assert result.grid.scale.isfinite().all()
        assert result.decode().isfinite().all()
        assert not result.decode()[:, 5].any()


def output_error(method, job):
    difference = run(method, job).decode() - job.weights
    return sum(float(seen.check.errors(d).sum()) for d, seen in zip(difference, job.inputs, strict=True))


@needs_data
@pytest.mark.parametrize("scheme", CODED, ids=str)
@pytest.mark.parametrize("shape", [(40, 100), (64, 128)], ids=str)
def test_data_lowers_the_output_error_of_codes(method, scheme, shape):
    job = coded_job([scheme] * 3, shape)
    assert output_error(method, job) < 0.6 * output_error("rtn", job)


@each_method
def test_a_trellis_of_two_bits_is_better_and_smaller_than_integers(method):
    """Of weights with a normal distribution; a table is smaller and worse."""
    trellis = Scheme(width=2, encoding="trellis")
    job = make_job((256, 256), widths=(2,))
    integers, codes = (output_error(method, replace(job, scheme=s)) for s in (Scheme(width=2), trellis))
    assert codes < 0.9 * integers
    assert trellis.stored_bytes((256, 256)) < 0.92 * Scheme(width=2).stored_bytes((256, 256))


@pytest.mark.parametrize("method", sorted(name for name, found in METHODS.items() if found.store))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_stored_is_what_the_method_finds(method, dtype):
    weights = (torch.randn(40, 100, generator=torch.Generator().manual_seed(3)) * 0.1).to(dtype)
    for scheme in [Scheme(width=width, symmetric=width % 2 == 0) for width in WIDTHS] + CODED:
        widths = torch.full((1, 40), scheme.width)
        found = METHODS[method].run(SolveBatch(weights.float()[None], widths, [], scheme, (40,)))
        matrix = PackedMatrix(scheme, (40, 100), METHODS[method].store(weights, scheme))
        assert torch.equal(matrix.dense(), found.decode()[0])


@needs_data
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 100), (64, 128)], ids=str)
def test_data_lowers_the_output_error_on_other_samples(method, width, shape):
    job = make_job(shape, widths=(width,) * 3)
    assert output_error(method, job) < 0.8 * output_error("rtn", job)


@pytest.mark.parametrize("features", [150, 330])
def test_gptq_is_optimal_brain_quantization_column_by_column(features):
    """The same as the update it is derived from: after each column the best correction of all later ones."""
    job = make_job((12, features), widths=(3,))
    result, seen = run("gptq", job), job.inputs[0]
    gram = seen.fit.double() / seen.fit.diagonal().mean()
    inverse = torch.linalg.inv(gram + damping(features, seen.tokens) * torch.eye(features))
    weights, expected = job.weights[0].double(), torch.zeros(12, features, dtype=torch.uint8)
    for column in seen.fit.diagonal().argsort(descending=True, stable=True).tolist():
        expected[:, column] = result.grid[0].encode(weights.float())[:, column]
        error = weights[:, column] - result.grid[0].decode(expected)[:, column]
        weights = weights - torch.outer(error, inverse[column]) / inverse[column, column]
        inverse = inverse - torch.outer(inverse[column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    # a value half-way between two levels may fall to either side and moves those after it
    assert (result.integers[0] == expected).float().mean() > 0.98


class Layer:
    """As much of a workspace and its model view as `quantize_piece` looks at."""

    def __init__(self, experts=3, hidden=64, inner=40):
        self.units, self.weights = [], {}
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for expert in range(experts):
            for projection, shape in shapes.items():
                self.add(f"experts.{expert}.{projection}", projection, expert, shape, "experts")
        self.add("q_proj", "q_proj", None, (32, hidden), "q_proj")

    def add(self, name, projection, expert, shape, module):
        role = "attention" if expert is None else "expert"
        self.units.append(Unit(name, 0, role, projection, expert, shape, module, projection))
        generator = torch.Generator().manual_seed(len(self.units))
        self.weights[name] = torch.randn(shape, generator=generator) * 0.1

    @property
    def view(self):
        return self

    def block_units(self, _):
        return self.units

    def weight(self, unit):
        return self.weights[unit.name]

    def inputs(self, tokens, **options):
        spaces = {input_space(unit): unit.shape[1] for unit in self.units}
        return {
            name: inputs_of(tokens, features, 2 * i, **options) for i, (name, features) in enumerate(spaces.items())
        }

    def quantized(self, method, schemes, inputs):
        found = quantize_piece(self, BlockPiece(0, METHODS[method], schemes, linear=inputs))
        return {
            unit.name: SimpleNamespace(
                **vars(found[unit.name]),
                dense=PackedMatrix(schemes[unit.name], unit.shape, found[unit.name].tensors).dense(),
            )
            for unit in self.units
        }


@pytest.fixture
def layer():
    return Layer()


EACH = [Scheme(width=width) for width in (*WIDTHS, 16)]


def mixed_schemes(layer, widths=(), schemes=EACH):
    schemes = [Scheme(width=width) for width in widths] or schemes
    return {unit.name: schemes[i % len(schemes)] for i, unit in enumerate(layer.units)}


@each_method
class TestUnits:
    @pytest.mark.parametrize("some", [EACH, CODED, EACH[1:4] + CODED[2:]], ids=["integers", "codes", "both"])
    def test_every_unit_is_stored_once_by_its_scheme(self, method, layer, some):
        schemes = mixed_schemes(layer, schemes=some)
        found = layer.quantized(method, schemes, layer.inputs(500))
        assert sorted(found) == sorted(unit.name for unit in layer.units)
        for unit in layer.units:
            result, scheme = found[unit.name], schemes[unit.name]
            stored = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in result.tensors.items()}
            assert stored == scheme.tensors(unit.shape)
            assert result.dense.shape == unit.shape
            assert result.method in {method, "rtn", "none"}
            if scheme.is_unquantized:
                assert torch.equal(result.dense, layer.weight(unit).bfloat16().float())

    def test_what_is_stored_is_what_is_decoded(self, method, layer):
        schemes = mixed_schemes(layer, widths=(2, 3, 4, 5))
        found = layer.quantized(method, schemes, layer.inputs(500))
        for unit in layer.units:
            result = found[unit.name]
            scheme, (out, features) = schemes[unit.name], unit.shape
            integers = unpack(
                [result.tensors[k] for k in sorted(result.tensors) if k[0] == "p"], scheme.width, unit.shape
            )
            group = torch.arange(features) // scheme.group_size
            offset = untile_rows(result.tensors["zero"], out).float()[:, group] * ((2**scheme.width - 1) / 255)
            decoded = untile_rows(result.tensors["scale"], out).float()[:, group] * (integers.float() - offset)
            assert torch.allclose(decoded, result.dense, atol=1e-6)

    @pytest.mark.parametrize("tokens", [0, 1, 5, 30])
    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_starved_units_are_never_worse_than_rounded(self, method, layer, tokens, width):
        schemes = mixed_schemes(layer, widths=(width,))
        inputs = layer.inputs(tokens)
        found, plain = (layer.quantized(name, schemes, inputs) for name in (method, "rtn"))
        for unit in layer.units:
            check = inputs[input_space(unit)].check
            ours, rounded = (
                float(check.errors(result[unit.name].dense - layer.weight(unit)).sum()) for result in (found, plain)
            )
            assert ours <= rounded

    def test_units_that_nothing_reached_are_rounded(self, method, layer):
        schemes = mixed_schemes(layer, widths=(3,))
        for inputs in ({}, layer.inputs(0, check=0), layer.inputs(100, check=0)):
            found = layer.quantized(method, schemes, inputs)
            plain = layer.quantized("rtn", schemes, {})
            assert {result.method for result in found.values()} == {"rtn"}
            assert all(torch.equal(found[name].dense, plain[name].dense) for name in plain)
            assert {result.error for result in found.values()} == {None}


@needs_data
def test_the_stored_error_is_that_of_the_check_samples(method, layer):
    inputs = layer.inputs(500)
    found = layer.quantized(method, mixed_schemes(layer, widths=(3,)), inputs)
    for unit in layer.units:
        result = found[unit.name]
        weight, x = layer.weight(unit), torch.linalg.cholesky(inputs[input_space(unit)].check.gram.double()).float()
        expected = ((result.dense - weight) @ x).square().sum() / (weight @ x).square().sum()
        assert result.error == pytest.approx(float(expected), rel=1e-3)
