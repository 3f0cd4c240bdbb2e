"""What stops before native code, and how kernels are found."""

from dataclasses import replace

import pytest
import torch
from exact import (
    CODED,
    CPU,
    MIXED,
    RUNNERS,
    make_layer,
    make_matrix,
    make_tokens,
    needs_native,
)

from moqa.errors import MoqaError
from moqa.format.encodings import ENCODINGS
from moqa.format.scheme import Scheme
from moqa.kernels import KERNELS, PackedMatrix, check_encoding, find_kernels, native

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Halves:
    """An encoding that no kernels have heard of: float16."""

    name = "halves"
    widths = (8,)

    def tensors(self, scheme, shape):
        return {"codes": (torch.float16, shape)}

    def decode(self, scheme, shape, tensors):
        return tensors["codes"].float()


class TestANewEncoding:
    @pytest.fixture
    def matrix(self, monkeypatch):
        monkeypatch.setitem(ENCODINGS, Halves.name, Halves())
        half = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).half()
        return PackedMatrix(Scheme(width=8, encoding=Halves.name), (40, 100), {"codes": half})

    def test_is_decoded_by_the_reference(self, matrix):
        x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(find_kernels("reference").linear(matrix, x), x @ matrix.codes.float().T)

    @pytest.mark.parametrize("name", ["native", "triton"])
    def test_is_refused_by_kernels_that_do_not_name_it(self, matrix, name):
        with pytest.raises(MoqaError, match=f"'{name}' do not multiply encoding 'halves': choose kernels reference"):
            check_encoding(KERNELS[name], matrix)

    @needs_native
    def test_is_refused_before_a_product(self, matrix):
        with pytest.raises(MoqaError, match="do not multiply encoding 'halves'"):
            KERNELS["native"].linear(matrix, torch.ones(3, 100))


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_all_kernels_multiply_codes(scheme):
    matrix = make_matrix(scheme, (40, 100), 0).matrix
    for kernels in KERNELS.values():
        check_encoding(kernels, matrix)


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
