"""Codes, levels and factors against a slow reading of their description."""

import pytest
import torch
from exact import CODED, LEVELS, level_of
from hypothesis import given
from hypothesis import strategies as st

from moqa.format.encodings import ENCODINGS
from moqa.format.levels import FACTORS, UPPER_LEVELS, LevelGrid, levels, pack_factors, unpack_factors
from moqa.format.planes import pack
from moqa.format.scheme import Scheme

SEEDS = st.integers(0, 2**31)


def test_levels_are_symmetric_and_end_at_63():
    assert {name: {w: tuple(upper) for w, upper in known.items()} for name, known in LEVELS.items()} == UPPER_LEVELS
    for encoding, known in LEVELS.items():
        for width in known:
            found = levels(encoding, width)
            assert len(found) == 2 ** (width + (encoding == "trellis"))
            assert found == tuple(sorted({-level for level in found}))
            assert found[-1] == 63
        assert ENCODINGS[encoding].widths == tuple(known)


def slow_factors(factors):
    """Bytes of [out, groups] factors as docs/format.md says where each is."""
    out, groups = factors.shape
    stored = [[[0] * 12 for _ in range(groups)] for _ in range(-(-out // 16))]
    for row in range(out):
        for group in range(groups):
            of_tile, place, factor = stored[row // 16][group], row % 16, int(factors[row, group])
            of_tile[place % 8] |= factor % 16 << place // 8 * 4
            of_tile[8 + place % 4] |= factor // 16 << place // 4 * 2
    return stored


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 50), st.integers(1, 9), SEEDS)
def test_unpacking_inverts_packing_of_factors(stack, out, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(0, FACTORS + 1, (*stack, out, groups), dtype=torch.uint8, generator=generator)
    packed = pack_factors(factors)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*stack, -(-out // 16), groups, 12))
    assert torch.equal(unpack_factors(packed, out), factors)
    whole = factors.flatten(0, -3)[0] if stack else factors
    assert pack_factors(whole).tolist() == slow_factors(whole)


def test_every_byte_of_factors_is_some():
    every = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 3, 12)
    factors = unpack_factors(every, 256 * 16)
    assert int(factors.max()) == FACTORS
    assert torch.equal(pack_factors(factors), every)


@given(
    st.sampled_from(CODED), st.sampled_from([32, 64, 256]), st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(1, 150), SEEDS,
)  # fmt: skip
def test_a_stack_decodes_as_its_stored_parts_do(kind, group, parts, features, seed):
    """Several matrices of mixed widths together, against each alone as a checkpoint has it, and the description."""
    generator = torch.Generator().manual_seed(seed)
    out, groups, known = sum(parts), -(-features // group), [s for s in CODED if s.encoding == kind.encoding]
    of_part = [known[int(torch.randint(len(known), (), generator=generator))].width for _ in parts]
    width = torch.repeat_interleave(torch.tensor(of_part, dtype=torch.uint8), torch.tensor(parts))[None]
    codes = torch.randint(0, 256, (1, out, features), generator=generator) % 2 ** width[..., None].long()
    scale = torch.rand(1, out, generator=generator).bfloat16()
    factor = torch.randint(0, 64, (1, out, groups), dtype=torch.uint8, generator=generator)
    grid = LevelGrid(kind.encoding, scale, factor, group, width, tuple(parts))
    found, begin = grid.decode(codes.to(torch.uint8)), 0
    assert (found.dtype, found.shape) == (torch.float32, (1, out, features))
    for rows, bits in zip(parts, of_part, strict=True):
        at, scheme = slice(begin, begin + rows), Scheme(width=bits, encoding=kind.encoding, group_size=group)
        begin += rows
        mine, part = codes[0, at].to(torch.uint8), grid[0, at]
        stored = part.stored(pack(mine, bits))
        shapes = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()}
        assert shapes == scheme.tensors((rows, features))
        decoded = scheme.storage.decode(scheme, (rows, features), stored)
        assert torch.equal(decoded, part.decode(mine))
        assert torch.equal(decoded, found[0, at])
        column = torch.arange(features) // group
        steps = scale[0, at, None].double() * factor[0, at][:, column]
        assert torch.equal(decoded.double(), steps * level_of(scheme, mine))


class TestSchemes:
    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"width": 4, "encoding": "trellis"}, "encoding trellis has no width 4; it has widths 1, 2, 3"),
            ({"width": 5, "encoding": "table"}, "encoding table has no width 5; it has widths 1, 2, 3, 4"),
            ({"width": 2, "encoding": "unquantized"}, "encoding unquantized has no width 2; it has widths 16"),
            ({"width": 2, "encoding": "table", "symmetric": True}, "encoding table is always symmetric: leave"),
            ({"width": 3, "encoding": "trellis", "symmetric": True}, "encoding trellis is always symmetric: leave"),
            ({"width": 2, "encoding": "Table"}, "encoding Table is unknown; known are int, table, trellis"),
        ],
        ids=str,
    )
    def test_what_does_not_exist_is_refused_in_one_line(self, wrong, said):
        with pytest.raises(ValueError, match=said) as caught:
            Scheme(**wrong)
        (only,) = caught.value.errors()
        assert "\n" not in only["msg"]

    @pytest.mark.parametrize("scheme", CODED, ids=str)
    def test_bytes_are_codes_a_scale_per_row_and_six_bits_per_group(self, scheme):
        assert scheme.is_coded
        assert scheme.stored_bytes((256, 256)) * 8 == 256 * (256 * scheme.width + 16 + 4 * 6)
        assert not scheme.model_copy(update={"width": 16}).is_coded
