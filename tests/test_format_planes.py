"""The plane layout against a slow reading of its description."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.format.planes import pack, unpack
from moqa.format.scheme import Scheme
from moqa.format.tiles import PLANES, WIDTHS

leading = st.lists(st.integers(1, 3), max_size=1)


def random_integers(shape, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**width, shape, dtype=torch.uint8, generator=generator)


def slow_pack(integers, width):
    """Bytes of each plane as docs/format.md says where each weight is."""
    out, features = integers.shape
    tiles, blocks, planes, shift = -(-out // 16), -(-features // 32), [], width
    for bits in PLANES[width]:
        shift -= bits
        plane = [[[0] * (64 * bits) for _ in range(blocks)] for _ in range(tiles)]
        for row in range(out):
            for column in range(features):
                vector, byte = column % 32 // 4, row % 16 * 4 + column % 4
                field = int(integers[row, column]) >> shift & 2**bits - 1
                place = vector // (8 // bits) * 64 + byte
                plane[row // 16][column // 32][place] += field << vector % (8 // bits) * bits
        planes.append(plane)
    return planes


@given(st.sampled_from(WIDTHS), leading, st.integers(1, 40), st.integers(1, 200), st.integers(0, 10**6))
def test_unpack_inverts_pack(width, stack, out, features, seed):
    integers = random_integers((*stack, out, features), width, seed)
    planes = pack(integers, width)
    assert torch.equal(unpack(planes, width, (out, features)), integers)
    assert all(plane.dtype == torch.uint8 for plane in planes)


@settings(max_examples=30)
@given(st.sampled_from(WIDTHS), st.integers(1, 40), st.integers(1, 100), st.integers(0, 10**6))
def test_layout_is_as_documented(width, out, features, seed):
    integers = random_integers((out, features), width, seed)
    assert [plane.tolist() for plane in pack(integers, width)] == slow_pack(integers, width)


@pytest.mark.parametrize("width", [width for width in WIDTHS if len(PLANES[width]) > 1])
def test_a_prefix_of_the_planes_is_a_coarser_version(width):
    integers, dropped = random_integers((3, 100), width, 0), 0
    planes = pack(integers, width)
    for bits in reversed(PLANES[width][1:]):
        dropped += bits
        planes = planes[:-1]
        assert torch.equal(unpack(planes, width, (3, 100)), integers >> dropped << dropped)


@given(st.sampled_from(WIDTHS), st.integers(1, 5), st.integers(1, 300))
def test_sizes_are_those_of_the_scheme(width, rows, features):
    planes = pack(torch.zeros(rows, features, dtype=torch.uint8), width)
    tensors = Scheme(width=width).tensors((rows, features))
    assert {f"p{i}": (p.dtype, tuple(p.shape)) for i, p in enumerate(planes)} == {
        name: entry for name, entry in tensors.items() if name.startswith("p")
    }


def test_planes_add_up_to_the_width():
    assert {width: sum(planes) for width, planes in PLANES.items()} == {width: width for width in WIDTHS}
