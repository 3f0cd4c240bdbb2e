"""The plane layout against a slow reading of its description."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moqa.format.planes import pack, unpack
from moqa.format.scheme import PLANES, WIDTHS, Scheme

shapes = st.lists(st.integers(1, 4), max_size=2)


def random_integers(shape, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**width, shape, dtype=torch.uint8, generator=generator)


def slow_pack(row, width):
    """Field k of byte j in a block of 64 weights holds weight 8 p k + j."""
    row = row + [0] * (-len(row) % 64)
    planes, shift = [], width
    for bits in PLANES[width]:
        shift -= bits
        plane = []
        for start in range(0, len(row), 64):
            for j in range(8 * bits):
                fields = [row[start + 8 * bits * k + j] >> shift & 2**bits - 1 for k in range(8 // bits)]
                plane.append(sum(field << bits * k for k, field in enumerate(fields)))
        planes.append(plane)
    return planes


@given(st.sampled_from(WIDTHS), shapes, st.integers(1, 200), st.integers(0, 10**6))
def test_unpack_inverts_pack(width, leading, features, seed):
    integers = random_integers((*leading, features), width, seed)
    planes = pack(integers, width)
    assert torch.equal(unpack(planes, width, features), integers)
    assert all(plane.dtype == torch.uint8 for plane in planes)


@given(st.sampled_from(WIDTHS), st.integers(1, 200), st.integers(0, 10**6))
def test_layout_is_as_documented(width, features, seed):
    integers = random_integers((features,), width, seed)
    assert [plane.tolist() for plane in pack(integers, width)] == slow_pack(integers.tolist(), width)


@pytest.mark.parametrize("width", [width for width in WIDTHS if len(PLANES[width]) > 1])
def test_a_prefix_of_the_planes_is_a_coarser_version(width):
    integers, dropped = random_integers((3, 100), width, 0), 0
    planes = pack(integers, width)
    for bits in reversed(PLANES[width][1:]):
        dropped += bits
        planes = planes[:-1]
        assert torch.equal(unpack(planes, width, 100), integers >> dropped << dropped)


@given(st.sampled_from(WIDTHS), st.integers(1, 5), st.integers(1, 300))
def test_sizes_are_those_of_the_scheme(width, rows, features):
    planes = pack(torch.zeros(rows, features, dtype=torch.uint8), width)
    tensors = Scheme(width=width).tensors((rows, features))
    assert {f"p{i}": (p.dtype, tuple(p.shape)) for i, p in enumerate(planes)} == {
        name: entry for name, entry in tensors.items() if name.startswith("p")
    }


def test_planes_add_up_to_the_width():
    assert {width: sum(planes) for width, planes in PLANES.items()} == {width: width for width in WIDTHS}
