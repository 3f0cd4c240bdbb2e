"""What all kernels must compute where an adjustment gives some channels bits of their own."""

import pytest
import torch
from exact import RUNNERS, Layer, Runner, make_layer, make_matrix, make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqa.format.scheme import Scheme
from moqa.format.tiles import KEEP_WIDTH, LARGEST_GROUP, WIDTHS
from moqa.kernels import ACTIVATIONS, Channels, Patch
from moqa.kernels.reference import activate

pytestmark = pytest.mark.usefixtures("one_thread")
PATCHING = [runner for runner in RUNNERS if runner.kernels.takes_patches]
each_runner = pytest.mark.parametrize("runner", PATCHING, ids=str)
BASE = [Scheme(width=width) for width in (3, 3, 4)]
CODES = [Scheme(width=width, encoding=encoding) for width, encoding in ((2, "trellis"), (3, "trellis"), (4, "table"))]


def make_channels(layer: Layer, projection: str, width: int, share: float, seed: int) -> Channels | None:
    """A random share of a layer's channels, whose rows or columns are as large as the packed ones."""
    experts, (inner, hidden) = len(layer.gate), layer.gate[0].matrix.shape
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(experts * inner, generator=generator) < share).nonzero()[:, 0]
    if not len(places):
        return None
    expert, channel = places // inner, places % inner
    if projection == "down":
        # one group of all columns, whose sizes differ: that is what the factors are for
        matrix = make_matrix(Scheme(width=width, group_size=LARGEST_GROUP), (hidden, len(places)), seed).matrix
        return Channels(matrix, expert, channel, torch.rand(len(places), generator=generator) + 0.5)
    return Channels(make_matrix(Scheme(width=width), (len(places), hidden), seed).matrix, expert, channel)


def make_patch(layer: Layer, widths: tuple[int, int, int], share: float, replaces: bool, seed: int) -> Patch:
    parts = zip(("gate", "up", "down"), widths, strict=True)
    found = [make_channels(layer, name, width, share, seed + i) for i, (name, width) in enumerate(parts)]
    return Patch(*found, replaces)


def merged(layer: Layer, patches: list[Patch], expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's matrices in double precision with the patches in them."""
    whole = [getattr(layer, name)[expert].weights.clone() for name in ("gate", "up", "down")]
    for patch in patches:
        for matrix, channels in zip(whole, (patch.gate, patch.up, patch.down), strict=True):
            if channels is None:
                continue
            at, rows = channels.of(expert), channels.matrix.dense().double()
            if channels.scale is not None:
                matrix, rows = matrix.T, (rows * channels.scale).T
            where = channels.channel[at]
            matrix[where] = rows[at] if patch.replaces else matrix[where] + rows[at]
    return tuple(whole)


def truth(layer: Layer, patches: list[Patch], x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """In double precision, and the size of what is added up to get it."""
    total, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(layer.gate)):
        gate, up, down = merged(layer, patches, expert)
        biases = [0 if b is None else b[expert].double() for b in (layer.gate_bias, layer.up_bias, layer.down_bias)]
        share = (weights.double() * (index == expert)).sum(1, keepdim=True)
        products = x.double() @ gate.T + biases[0], x.double() @ up.T + biases[1]
        inner = activate(layer.activation, *products)
        total += share * (inner @ down.T + biases[2])
        # a weight is a difference: what is added up may be as large as the largest
        gate, up, down = (matrix.abs() + matrix.abs().max() for matrix in (gate, up, down))
        terms = (x.double().abs() @ gate.T + 1) * (x.double().abs() @ up.T + 1)
        size += share * (terms @ down.T)
    return total, size


def check(runner: Runner, layer: Layer, patches: list[Patch], tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    layer.stack.patches, layer.stack.prepared = patches, None
    found, (wanted, size) = runner.experts(layer.stack, *tokens), truth(layer, patches, *tokens)
    # activations of 8 bits are off by up to 1/254 of the largest of their group, at each of two products
    error = (found - wanted).abs()
    assert bool((error <= 1e-4 * wanted.abs() + (0.02 if runner.quantizes else 1e-5) * size).all())
    if runner.quantizes and wanted.numel() > 500:  # errors of many terms do not add up all in one direction
        assert float(error.norm()) <= 0.08 * float(wanted.norm())
    return found


@each_runner
class TestPatches:
    @settings(max_examples=60)
    @given(
        st.integers(1, 5), st.integers(1, 120), st.integers(1, 120), st.sampled_from([*WIDTHS, KEEP_WIDTH]),
        st.sampled_from([0.02, 0.3, 1.0]), st.booleans(), st.sampled_from(ACTIVATIONS), st.booleans(),
        st.integers(1, 40), st.integers(0, 2**16),
    )  # fmt: skip
    def test_any(self, runner, experts, hidden, inner, width, share, replaces, activation, bias, tokens, seed):
        layer = make_layer((CODES if seed % 3 == 0 else BASE) * experts, hidden, inner, activation, bias, seed)
        patch = make_patch(layer, (width, width, width), share, replaces, seed)
        check(runner, layer, [patch], make_tokens(layer, tokens, 2, seed=seed))

    @pytest.mark.parametrize("tokens", [1, 3, 70])
    def test_several_add_up(self, runner, tokens):
        layer = make_layer(BASE * 6, 128, 96)
        patches = [
            make_patch(layer, (1, 2, 3), 0.2, False, 1), make_patch(layer, (16, 4, 16), 0.1, False, 7),
            make_patch(layer, (8, 8, 8), 0.05, False, 13),
        ]  # fmt: skip
        check(runner, layer, patches, make_tokens(layer, tokens, 3))

    def test_a_part_alone(self, runner):
        layer, tokens = make_layer(BASE * 4, 64, 64), None
        tokens = make_tokens(layer, 5, 2)
        whole = make_patch(layer, (3, 3, 3), 0.3, False, 0)
        found = [
            check(
                runner, layer, [Patch(**{"gate": None, "up": None, "down": None, name: getattr(whole, name)})], tokens
            )
            for name in ("gate", "up", "down")
        ]
        assert not any(torch.equal(a, b) for a, b in zip(found, found[1:] + found[:1], strict=True))

    def test_none_is_the_layer_itself(self, runner):
        layer = make_layer(BASE * 4, 64, 64)
        tokens = make_tokens(layer, 5, 2)
        plain = runner.experts(layer.stack, *tokens)
        check(runner, layer, [make_patch(layer, (3, 3, 3), 0.3, False, 0)], tokens)
        layer.stack.patches, layer.stack.prepared = [], None
        assert torch.equal(runner.experts(layer.stack, *tokens), plain)

    @pytest.mark.parametrize("threads", [2, 5])
    def test_neither_threads_nor_rows_beside_matter(self, runner, threads):
        if not runner.quantizes:
            pytest.skip("torch's sums depend on both")
        layer = make_layer(BASE * 8, 160, 200)
        x, index, weights = make_tokens(layer, 40, 2)
        found = check(runner, layer, [make_patch(layer, (2, 2, 3), 0.1, False, 0)], (x, index, weights))
        torch.set_num_threads(threads)
        assert torch.equal(runner.experts(layer.stack, x, index, weights), found)
        torch.set_num_threads(1)
        for row in (0, 17, 39):
            one = slice(row, row + 1)
            assert torch.equal(runner.experts(layer.stack, x[one], index[one], weights[one]), found[one])


@pytest.mark.skipif(all(not runner.quantizes for runner in PATCHING), reason="the native kernels were not built")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: setattr(c, "channel", c.channel.flip(0)), "ascending"),
        (lambda c: setattr(c, "channel", c.channel + 64), "out of range"),
        (lambda c: setattr(c, "expert", c.expert + 4), "out of range"),
        (lambda c: setattr(c, "channel", c.channel[1:]), "channels in a matrix"),
        (lambda c: setattr(c, "scale", torch.ones(3)), "scales"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, said):
    layer = make_layer(BASE * 4, 64, 64)
    patch = make_patch(layer, (3, 3, 3), 0.3, False, 0)
    change(patch.down)
    layer.stack.patches = [patch]
    native = next(runner for runner in PATCHING if runner.quantizes)
    with pytest.raises(ValueError, match=said):
        native.experts(layer.stack, *make_tokens(layer, 2, 2))
