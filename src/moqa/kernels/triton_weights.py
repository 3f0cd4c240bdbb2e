# mypy: ignore-errors
# ruff: noqa: RET505 (Triton compiles the code after a return unless it is in an `else`)
"""What the Triton kernels (`triton_ops.py`) read of a matrix: its weights as bytes, and the grid of a group.

A word holds four inputs of a row in its bytes: a vector of `moqa/format/planes.py` is one word for each row of a tile.
A byte is an integer, or a level to which `LEVEL_ZERO` was added, so that it has no sign.

`FORM` says what the integers are: 0 on a grid with zero-points, 1 on a symmetric one, 2 codes of `table`, 3 of
`trellis`.
"""

import struct

import triton
import triton.language as tl

from moqa.format import levels, tiles

TILE = tl.constexpr(tiles.TILE)
BLOCK = tl.constexpr(tiles.BLOCK)
# bits of each plane, by width
PLANES = tl.constexpr(((), *(tiles.PLANES[width] for width in tiles.WIDTHS)))
# values of FORM
SYMMETRIC = tl.constexpr(1)
TABLE = tl.constexpr(2)
TRELLIS = tl.constexpr(3)
LEVEL_ZERO = tl.constexpr(64)
# of the factors of a tile and group
FACTOR_BYTES = tl.constexpr(12)
# the lowest bit of each byte
_ONES = tl.constexpr(0x01010101)


def _level_words(encoding: str) -> tuple[tuple[int, ...], ...]:
    """By width, 16 bytes with its levels as four words."""
    found = [(0,) * 4]
    for width in levels.UPPER_LEVELS[encoding]:
        stored = bytes(level + LEVEL_ZERO.value for level in levels.levels(encoding, width))
        found.append(struct.unpack("<4i", stored.ljust(16, b"\0")))
    return tuple(found)


_TABLE_LEVELS = tl.constexpr(_level_words("table"))
_TRELLIS_LEVELS = tl.constexpr(_level_words("trellis"))


@triton.jit
def pointer(field, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The address in a field of a table of matrices."""
    return tl.multiple_of(tl.load(field).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def planes_of(entry):
    """Addresses of a matrix's planes."""
    return (pointer(entry, tl.int32, 16), pointer(entry + 1, tl.int32, 16), pointer(entry + 2, tl.int32, 16))


@triton.jit
def scales_of(entry, HALF: tl.constexpr):
    """Address of a matrix's scales."""
    return pointer(entry + 3, tl.float16 if HALF else tl.bfloat16, 16)


@triton.jit
def zeros_of(entry, FORM: tl.constexpr):
    """Address of a matrix's zeros, or factors."""
    return pointer(entry + 4, tl.uint8, 4 if FORM >= TABLE else 16)


# ---- scales and zero-points


@triton.jit
def row_scale(scales, tile, tiles, lane, FORM: tl.constexpr):
    """Scales of whole rows, which only codes have."""
    if FORM >= TABLE:
        return tl.load(scales + tile * TILE + lane, mask=tile < tiles, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def grid_of(scale_of_row, scales, zeros, cell, lane, mask, FORM: tl.constexpr, WIDTH: tl.constexpr):
    """Scale and zero-point of a tile's rows in one group: the tile's `cell`. Codes have factors in place of zeros."""
    at = cell * TILE + lane
    if FORM >= TABLE:
        factors = zeros + cell * FACTOR_BYTES
        low = tl.load(factors + lane % 8, mask=mask, other=0).to(tl.int32) >> (lane // 8 * 4) & 15
        high = tl.load(factors + 8 + lane % 4, mask=mask, other=0).to(tl.int32) >> (lane // 4 * 2) & 3
        return scale_of_row * (low | high << 4).to(tl.float32), tl.full(at.shape, LEVEL_ZERO, tl.float32)
    else:
        scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
        if FORM == SYMMETRIC:
            return scale, tl.full(at.shape, 2.0 ** (WIDTH - 1), tl.float32)
        else:
            return scale, tl.load(zeros + at, mask=mask, other=0).to(tl.float32) * ((2.0**WIDTH - 1) / 255)


# ---- levels


@triton.jit
def _permuted(low, high, chosen, PRMT: tl.constexpr):
    """Four of the eight bytes in two words, by the numbers in the lowest four half bytes of `chosen`; 8 and more: zero.

    For these, NVIDIA's instruction repeats the sign bit of a byte: zero, since bytes are below 128.
    """
    if PRMT:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, chosen], tl.int32, True, 1)
    else:
        both = (tl.cast(high, tl.int64) << 32) | low
        bits = tl.cast(chosen, tl.int64) << 2
        found = 0
        for n in tl.static_range(4):
            # two shifts of half the size, since one of 64 bits or more is undefined
            half = (bits >> (4 * n)) & 60
            found |= (both >> half >> half & 255) << (8 * n)
        return found.to(tl.int32)


@triton.jit
def _four_levels(indexes, FORM: tl.constexpr, WIDTH: tl.constexpr, PRMT: tl.constexpr):
    """Levels that the lowest four half bytes of `indexes` number, from a table in the instructions themselves."""
    TABLES: tl.constexpr = _TRELLIS_LEVELS if FORM == TRELLIS else _TABLE_LEVELS
    found = _permuted(TABLES[WIDTH][0], TABLES[WIDTH][1], indexes, PRMT)
    if TABLES[WIDTH][2] != 0:
        # in each byte, one of the two is zero
        found |= _permuted(TABLES[WIDTH][2], TABLES[WIDTH][3], indexes ^ 0x8888, PRMT)
    return found


@triton.jit
def _levels(indexes, FORM: tl.constexpr, WIDTH: tl.constexpr, PRMT: tl.constexpr):
    """Two vectors of levels: of the lower and of the upper half byte of each byte.

    An instruction that permutes bytes finds four levels at once, and takes indexes from half bytes. To load the level
    of each weight from memory would take more instructions than all else that is done with it.
    """
    left = _four_levels(indexes, FORM, WIDTH, PRMT)
    right = _four_levels(indexes >> 16, FORM, WIDTH, PRMT)
    return _permuted(left, right, 0x6420, PRMT), _permuted(left, right, 0x7531, PRMT)


# ---- one block of a tile, in registers


@triton.jit
def _words_of_plane(plane, cell, lane, mask, BITS: tl.constexpr):
    words = ()
    for i in tl.static_range(BITS):
        words += (tl.load(plane + ((cell * BITS + i) * TILE + lane), mask=mask, other=0),)
    return words


@triton.jit
def words_of_block(planes, tile, tiles, block, blocks, lane, mask, FORM: tl.constexpr, WIDTH: tl.constexpr):
    """All words of a tile's block, plane by plane; of a trellis, also the coded bits of the two tiles before."""
    LAST: tl.constexpr = len(PLANES[WIDTH]) - 1
    words = ()
    for n in tl.static_range(LAST + 1):
        words += _words_of_plane(planes[n], tile * blocks + block, lane, mask, PLANES[WIDTH][n])
    if FORM == TRELLIS:
        for n in tl.static_range(1, 3):
            # the first tiles follow the last ones
            cell = (tile + 2 * tiles - n) % tiles * blocks + block
            words += _words_of_plane(planes[LAST], cell, lane, mask, PLANES[WIDTH][LAST])
    return words


@triton.jit
def _field(words, V: tl.constexpr, BITS: tl.constexpr):
    return (words[V * BITS // 8] >> (V * BITS % 8)) & (_ONES * (2**BITS - 1))


@triton.jit
def _integers(words, V: tl.constexpr, WIDTH: tl.constexpr):
    """Vector V of a block."""
    found = 0
    for n in tl.static_range(len(PLANES[WIDTH])):
        found = (found << PLANES[WIDTH][n]) | _field(words, V, PLANES[WIDTH][n])
        words = words[PLANES[WIDTH][n] :]
    return found


@triton.jit
def _pair(words, V: tl.constexpr, BITS: tl.constexpr):
    """Vectors V and V + 4 of a plane, side by side in half bytes.

    They are fields at the same place of two words, or half a byte apart in one.
    """
    return _field(words, V, BITS) | (_field(words, V + 4, BITS) << 4)


@triton.jit
def _with_parity(words, WIDTH: tl.constexpr):
    """Words of a trellis's block with c ^ c2 in place of the coded bits, and no more of the older tile."""
    BITS: tl.constexpr = PLANES[WIDTH][len(PLANES[WIDTH]) - 1]
    # a plane of two bits has a free one, too
    CODED: tl.constexpr = 0x55555555 if BITS == 2 else -1
    parity = ()
    for i in tl.static_range(BITS):
        parity += (words[WIDTH - BITS + i] ^ (words[WIDTH + BITS + i] & CODED),)
    return words[: WIDTH - BITS] + parity + words[WIDTH : WIDTH + BITS]


@triton.jit
def _indexes(words, V: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr):
    """Indexes of the levels of vectors V and V + 4, side by side in half bytes."""
    LAST: tl.constexpr = PLANES[WIDTH][len(PLANES[WIDTH]) - 1]
    found = 0
    for n in tl.static_range(len(PLANES[WIDTH])):
        found = (found << PLANES[WIDTH][n]) | _pair(words, V, PLANES[WIDTH][n])
        words = words[PLANES[WIDTH][n] :]
    if FORM == TRELLIS:
        found = (found << 1) | (_pair(words, V, LAST) & 0x11111111)
    return found


@triton.jit
def vectors_of_block(words, FORM: tl.constexpr, WIDTH: tl.constexpr, PRMT: tl.constexpr):
    """The eight vectors of a block."""
    if FORM == TRELLIS:
        words = _with_parity(words, WIDTH)
    first = ()
    second = ()
    for v in tl.static_range(4):
        if FORM >= TABLE:
            found = _levels(_indexes(words, v, FORM, WIDTH), FORM, WIDTH, PRMT)
            first += (found[0],)
            second += (found[1],)
        else:
            first += (_integers(words, v, WIDTH),)
            second += (_integers(words, v + 4, WIDTH),)
    return first + second


# ---- blocks of many rows, as an operand of tensor cores


@triton.jit
def _fields(plane, tile, lane, here, block, blocks, BITS: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr):
    """What one plane has of all vectors, [OUT, CHUNK // 4]."""
    vector = tl.arange(0, CHUNK // BLOCK * BITS)[:, None]
    mask = here[None, :] & (block + vector // BITS < blocks)
    word = ((tile * blocks + block) * (BITS * TILE) + lane)[None, :] + vector * TILE
    words = tl.load(plane + word, mask=mask, other=0)
    fields = (words[:, :, None] >> (tl.arange(0, 8 // BITS) * BITS)[None, None, :]) & (_ONES * (2**BITS - 1))
    return tl.reshape(tl.permute(fields, (1, 0, 2)), (OUT, CHUNK // 4))


@triton.jit
def _vectors(
    planes, tile, tiles, lane, here, block, blocks,
    FORM: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Integers, or indexes of levels, [OUT, CHUNK // 4]; the first tiles of a trellis follow the last ones."""
    LAST: tl.constexpr = len(PLANES[WIDTH]) - 1
    BITS: tl.constexpr = PLANES[WIDTH][LAST]
    vectors = 0
    for n in tl.static_range(LAST + 1):
        fields = _fields(planes[n], tile, lane, here, block, blocks, PLANES[WIDTH][n], OUT, CHUNK)
        vectors = (vectors << PLANES[WIDTH][n]) | fields
    if FORM == TRELLIS:
        newest = (tile + 2 * tiles - 1) % tiles
        older = (tile + 2 * tiles - 2) % tiles
        newest = _fields(planes[LAST], newest, lane, here, block, blocks, BITS, OUT, CHUNK)
        older = _fields(planes[LAST], older, lane, here, block, blocks, BITS, OUT, CHUNK)
        vectors = ((vectors ^ (older & _ONES)) << 1) | (newest & _ONES)
    return vectors


@triton.jit
def bytes_of_blocks(
    planes, tile, tiles, lane, here, block, blocks,
    FORM: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr, PRMT: tl.constexpr,
):  # fmt: skip
    """[OUT, CHUNK] int8: weights of some rows from `block` on; 128 is subtracted from those of 8 bits."""
    words = _vectors(planes, tile, tiles, lane, here, block, blocks, FORM, WIDTH, OUT, CHUNK)
    if FORM >= TABLE:
        first, second = tl.split(tl.reshape(words, (OUT, CHUNK // 8, 2)))
        first, second = _levels(first | (second << 4), FORM, WIDTH, PRMT)
        words = tl.reshape(tl.join(first, second), (OUT, CHUNK // 4))
    # bytes are joined rather than broadcast, so that the thread that holds a word holds all of them
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    weights = tl.reshape(tl.join(even, odd), (OUT, CHUNK))
    if WIDTH == 8:
        weights ^= -128
    return weights
