# mypy: ignore-errors
# ruff: noqa: RET505 (Triton compiles the code after a return unless it is in an `else`)
"""The four Triton kernels; `triton.py` launches them. Importing this file imports triton.

All of them do the arithmetic of the C++ kernels in the same order: integers within a group, then one fused step per
group, the groups of a slice from left to right, then the slices from left to right. Operations are fused only where the
code says so (`enable_fp_fusion=False`). So a row's result depends neither on the other rows nor on the kernel that
computed it.

`KINDS` lists the kinds of matrices in a table, four numbers for each: width, group size, form (`triton_weights.py`),
float16 scales. `NVIDIA`: the GPU has NVIDIA's instructions. Only features of Triton 3.4 are used, the version that
torch 2.8 comes with.
"""

import triton
import triton.language as tl

from moqa.kernels.triton_weights import (
    BLOCK,
    TILE,
    bytes_of_blocks,
    grid_of,
    planes_of,
    pointer,
    row_scale,
    scales_of,
    vectors_of_block,
    words_of_block,
    zeros_of,
)

# groups of a matrix are split into this many runs, which a single row sums in parallel
SLICES = tl.constexpr(8)


@triton.jit
def quantize(x, q, steps, features, q_stride, stride, SIZES: tl.constexpr, COUNT: tl.constexpr):
    """Quantize rows to 8 bits, once per group size: value = scale * q. A step is the sum of q above the scale's bits.

    SIZES: every group size, each followed by the next power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    q += row * q_stride
    steps += row * stride
    for i in tl.static_range(0, len(SIZES), 2):
        inner = tl.arange(0, SIZES[i + 1])[None, :]
        groups = tl.cdiv(features, SIZES[i])
        at = group[:, None] * SIZES[i] + inner
        stored = (inner < SIZES[i]) & (group < groups)[:, None]
        values = tl.load(x + row * features + at, mask=stored & (at < features), other=0.0).to(tl.float32)
        # magnitudes are ordered like their bit patterns; NaN and infinity are the largest
        largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        lost = largest >= 0x7F800000
        scale = tl.div_rn(tl.where(lost, 0, largest).to(tl.float32, bitcast=True), 127.0)
        inverse = tl.where(scale >= 1e-36, tl.div_rn(1.0, tl.where(scale >= 1e-36, scale, 1.0)), 0.0)
        # adding 1.5 * 2^23 leaves the rounded integer in the low bits
        shifted = tl.where(lost[:, None], 0.0, values) * inverse[:, None] + 12582912.0
        n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(q + at, n.to(tl.int8), mask=stored)
        # a NaN scale makes all outputs of the row NaN
        scale = tl.where(lost, float("nan"), scale).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(steps + group, (tl.sum(n, 1).to(tl.int64) << 32) | scale, mask=group < groups)
        q += groups * SIZES[i]
        steps += groups


@triton.jit
def _rescaled(total, dot, weight_scale, zero, step, SIGNED: tl.constexpr):
    """Add one group: total + weight scale * (scale * dot - zero * scale * sum)."""
    scale = step.to(tl.int32).to(tl.float32, bitcast=True)
    sums = (step >> 32).to(tl.int32)
    if SIGNED:  # 128 was subtracted from every weight
        dot += 128 * sums
    return tl.fma(weight_scale, tl.fma(-zero, scale * sums.to(tl.float32), scale * dot.to(tl.float32)), total)


@triton.jit
def _in_order(x, ROWS: tl.constexpr):
    """Sum of [ROWS, 8, 16] over the slices, from left to right."""
    even, odd = tl.split(tl.reshape(tl.permute(x, (0, 2, 1)), (ROWS, TILE, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (ROWS, TILE, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (ROWS, TILE, 2, 2)))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return ((((((x0 + x1) + x2) + x3) + x4) + x5) + x6) + x7


@triton.jit
def _add_products(dot, word, quad, NVIDIA: tl.constexpr):
    """Add the products of four weights, without a sign, with four inputs."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, quad, dot], tl.int32, True, 1
        )
    else:
        for i in tl.static_range(4):
            dot += ((word >> 8 * i) & 255) * ((quad << (24 - 8 * i)) >> 24)
        return dot


@triton.jit
def _few_of_kind(
    entry, tile, rows, live, q, steps, features, q_stride, stride, out,
    WIDTH: tl.constexpr, G: tl.constexpr, FORM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = 128 if (G & -G) > 128 else (G & -G)
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    # loads of this many groups are issued before any is used: a single row is bound by memory latency
    BATCH: tl.constexpr = 128 // G if CHUNK == G else 1
    EAGER: tl.constexpr = ROWS <= 2
    planes = planes_of(entry)
    scales = scales_of(entry, HALF)
    zeros = zeros_of(entry, FORM)
    inputs = q + tl.multiple_of(tl.load(entry + 6), 32) + rows.to(tl.int64) * q_stride
    pairs = inputs.to(tl.pointer_type(tl.int64))
    steps += tl.load(entry + 7) + rows * stride
    lane = tl.arange(0, TILE)[None, None, :]
    tiles = tl.cdiv(out, TILE)
    scale = row_scale(scales, tile, tiles, lane, FORM)
    blocks = tl.cdiv(features, BLOCK)
    groups = tl.cdiv(features, G)
    each = tl.cdiv(groups, SLICES)
    begin = tl.arange(0, SLICES)[None, :, None] * each
    end = tl.minimum(begin + each, groups)
    total = tl.zeros([ROWS, SLICES, TILE], tl.float32)
    for turn in range(0, each, BATCH):
        grids = ()
        for g in tl.static_range(BATCH):
            used = begin + turn + g < end
            cell = tile * groups + begin + turn + g
            grids += grid_of(scale, scales, zeros, cell, lane, used, FORM, WIDTH)
            grids += (tl.load(steps + begin + turn + g, mask=live & used, other=0),)
        dot = tl.zeros([ROWS, SLICES, TILE], tl.int32)
        for chunk in range(G // CHUNK):
            words = ()
            given = ()
            for g in tl.static_range(BATCH):
                for b in tl.static_range(BLOCKS):
                    block = (begin + turn + g) * (G // BLOCK) + chunk * BLOCKS + b
                    stored = (begin + turn + g < end) & (block < blocks)
                    words += (words_of_block(planes, tile, tiles, block, blocks, lane, stored, FORM, WIDTH),)
                    if EAGER:
                        for i in tl.static_range(4):
                            given += (tl.load(pairs + (block * 4 + i), mask=live & stored, other=0),)
            for g in tl.static_range(BATCH):
                for b in tl.static_range(BLOCKS):
                    if not EAGER:
                        block = (begin + turn + g) * (G // BLOCK) + chunk * BLOCKS + b
                        stored = (begin + turn + g < end) & (block < blocks)
                        given = ()
                        for i in tl.static_range(4):
                            given += (tl.load(pairs + (block * 4 + i), mask=live & stored, other=0),)
                    vectors = vectors_of_block(words[g * BLOCKS + b], FORM, WIDTH, NVIDIA)
                    for v in tl.static_range(8):
                        pair = given[((g * BLOCKS + b) * 4 if EAGER else 0) + v // 2]
                        dot = _add_products(dot, vectors[v], (pair >> (v % 2 * 32)).to(tl.int32), NVIDIA)
                if CHUNK == G:
                    total = _rescaled(total, dot, grids[3 * g], grids[3 * g + 1], grids[3 * g + 2], False)
                    dot = tl.zeros([ROWS, SLICES, TILE], tl.int32)
        if CHUNK != G:
            total = _rescaled(total, dot, grids[0], grids[1], grids[2], False)
    return _in_order(total, ROWS)


@triton.jit
def _tile_of_kind(
    entry, first, rows, live, q, steps, features, q_stride, stride, out,
    WIDTH: tl.constexpr, G: tl.constexpr, FORM: tl.constexpr, HALF: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = 128 if (G & -G) > 128 else (G & -G)
    planes = planes_of(entry)
    scales = scales_of(entry, HALF)
    zeros = zeros_of(entry, FORM)
    inputs = q + tl.multiple_of(tl.load(entry + 6), 32) + (rows.to(tl.int64) * q_stride)[:, None]
    steps += tl.load(entry + 7)
    row = first + tl.arange(0, OUT)
    tile = row // TILE
    lane = row % TILE
    tiles = tl.cdiv(out, TILE)
    here = tile < tiles
    scale = row_scale(scales, tile, tiles, lane, FORM)
    blocks = tl.cdiv(features, BLOCK)
    groups = tl.cdiv(features, G)
    each = tl.cdiv(groups, SLICES)
    total = tl.zeros([OUT, ROWS], tl.float32)
    for begin in range(0, groups, each):
        part = tl.zeros([OUT, ROWS], tl.float32)
        for group in tl.range(begin, tl.minimum(begin + each, groups), num_stages=3):
            weight_scale, zero = grid_of(scale, scales, zeros, tile * groups + group, lane, here, FORM, WIDTH)
            step = tl.load(steps + (rows * stride + group), mask=live, other=0)[None, :]
            dot = tl.zeros([OUT, ROWS], tl.int32)
            for chunk in range(G // CHUNK):
                block = group * (G // BLOCK) + chunk * (CHUNK // BLOCK)
                x = tl.load(inputs + (block * BLOCK + tl.arange(0, CHUNK))[None, :], mask=live[:, None], other=0)
                w = bytes_of_blocks(planes, tile, tiles, lane, here, block, blocks, FORM, WIDTH, OUT, CHUNK, NVIDIA)
                dot = tl.dot(w, tl.trans(x), acc=dot, out_dtype=tl.int32)
            part = _rescaled(part, dot, weight_scale[:, None], zero[:, None], step, WIDTH == 8)
        total += part
    return total


@triton.jit
def _add_dot(total, w, x, EMULATED: tl.constexpr):
    if EMULATED:  # the interpreter cannot multiply bfloat16
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc=total)
    else:
        return tl.dot(w, tl.trans(x), acc=total)


@triton.jit
def _tile_of_kept(
    entry, first, rows, live, values, features, out, OUT: tl.constexpr, ROWS: tl.constexpr, EMULATED: tl.constexpr
):
    """Products with bfloat16 weights; float32 inputs are split into three bfloat16 parts, without loss."""
    weight = pointer(entry, tl.bfloat16, 16)
    row = first + tl.arange(0, OUT)
    total = tl.zeros([OUT, ROWS], tl.float32)
    for begin in range(0, features, 64):
        inputs = begin + tl.arange(0, 64)
        stored = (row < out)[:, None] & (inputs < features)[None, :]
        w = tl.load(weight + row.to(tl.int64)[:, None] * features + inputs[None, :], mask=stored, other=0.0)
        given = live[:, None] & (inputs < features)[None, :]
        x = tl.load(values + (rows.to(tl.int64) * features)[:, None] + inputs[None, :], mask=given, other=0.0)
        if x.dtype == tl.bfloat16:
            total = _add_dot(total, w, x, EMULATED)
        else:
            high = x.to(tl.bfloat16)
            x -= high.to(tl.float32)
            middle = x.to(tl.bfloat16)
            low = (x - middle.to(tl.float32)).to(tl.bfloat16)
            total = _add_dot(total, w, low, EMULATED)
            total = _add_dot(total, w, middle, EMULATED)
            total = _add_dot(total, w, high, EMULATED)
    return total


@triton.jit
def _few(
    entry, tile, rows, live, q, steps, features, q_stride, stride, out,
    KINDS: tl.constexpr, ROWS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([ROWS, TILE], tl.float32)
    for i in tl.static_range(0, len(KINDS), 4):
        # with only one kind, there is no need to wait for the table to say which
        if len(KINDS) == 4 or tl.load(entry + 5) == i:
            total = _few_of_kind(
                entry, tile, rows, live, q, steps, features, q_stride, stride, out, KINDS[i], KINDS[i + 1],
                KINDS[i + 2], KINDS[i + 3], ROWS, NVIDIA,
            )  # fmt: skip
    return total


@triton.jit
def _many(
    entry, first, rows, live, values, q, steps, features, q_stride, stride, out,
    KINDS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, NVIDIA: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([OUT, ROWS], tl.float32)
    for i in tl.static_range(0, len(KINDS), 4):
        if len(KINDS) == 4 or tl.load(entry + 5) == i:
            if KINDS[i] == 16:
                total = _tile_of_kept(entry, first, rows, live, values, features, out, OUT, ROWS, EMULATED)
            else:
                total = _tile_of_kind(
                    entry, first, rows, live, q, steps, features, q_stride, stride, out, KINDS[i], KINDS[i + 1],
                    KINDS[i + 2], KINDS[i + 3], OUT, ROWS, NVIDIA,
                )  # fmt: skip
    return total


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.where(x < -88.0, 88.0, -x)))


@triton.jit
def _activated(gate, up, NAME: tl.constexpr):
    """Same as `reference.activate`; the comparisons let NaN stay NaN."""
    if NAME == "silu":
        return gate * _sigmoid(gate) * up
    elif NAME == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif NAME == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        tl.static_assert(NAME == "swiglu_clamped")
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return (up + 1.0) * gate * _sigmoid(1.702 * gate)


@triton.jit(do_not_specialize=["slots"])
def few(
    table, y, bias, q, steps, index, slots, shared, experts, features, q_stride, stride, out,
    KINDS: tl.constexpr, ROUTED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """A tile of 16 outputs of `ROWS` rows: unpacked in registers and multiplied there.

    Slot s multiplies input row s // shared and writes output row s. ROUTED: one slot, whose expert is in `index`.
    """
    tile = tl.program_id(0)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = 0
    if ROUTED:
        expert = tl.load(index + tl.program_id(1))
        if (expert < 0) | (expert >= experts):
            return
    live = slot < slots
    rows = (slot // shared)[:, None, None]
    here = live[:, None, None]
    entry = table + expert * 8
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < out
    total = tl.zeros([ROWS, TILE], tl.float32)
    gate = total
    # a loop, so that the code for gate is compiled once and used for up, too
    for matrix in range(1 if ACTIVATION is None else 2):
        gate = total
        total = _few(
            entry + matrix * experts * 8, tile, rows, here, q, steps, features, q_stride, stride, out, KINDS, ROWS,
            NVIDIA,
        )  # fmt: skip
        if bias is not None:
            at = (matrix * experts + expert) * out + column
            total += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        total = _activated(gate, total, ACTIVATION)
    tl.store(y + slot.to(tl.int64)[:, None] * out + column[None, :], total, mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["slots"])
def many(
    table, y, bias, q, steps, values, order, work, starts, ends, slots, shared, experts, features, q_stride, stride,
    out, KINDS: tl.constexpr, ROUTED: tl.constexpr, ACTIVATION: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    NVIDIA: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """A tile of `OUT` outputs of `ROWS` rows: unpacked to bytes and multiplied by the tensor cores.

    ROUTED: slots in `order` by expert; those of expert e are starts[e] .. starts[e + 1] - 1, and its last piece of
    `ROWS` slots is ends[e] - 1; piece p belongs to expert work[p].
    """
    first = tl.program_id(0) * OUT
    piece = tl.program_id(1)
    expert = 0
    if ROUTED:
        expert = tl.load(work + piece)
        if expert >= experts:
            return
        begin = tl.load(starts + expert)
        end = tl.load(starts + expert + 1)
        place = begin + (piece - tl.load(ends + expert) + tl.cdiv(end - begin, ROWS)) * ROWS + tl.arange(0, ROWS)
        live = place < end
        slot = tl.load(order + place, mask=live, other=0).to(tl.int32)
    else:
        slot = piece * ROWS + tl.arange(0, ROWS)
        live = slot < slots
    rows = tl.where(live, slot // shared, 0)
    entry = table + expert * 8
    column = first + tl.arange(0, OUT)
    inside = column < out
    total = tl.zeros([OUT, ROWS], tl.float32)
    gate = total
    for matrix in range(1 if ACTIVATION is None else 2):
        gate = total
        total = _many(
            entry + matrix * experts * 8, first, rows, live, values, q, steps, features, q_stride, stride, out, KINDS,
            OUT, ROWS, NVIDIA, EMULATED,
        )  # fmt: skip
        if bias is not None:
            at = (matrix * experts + expert) * out + column
            total += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        total = _activated(gate, total, ACTIVATION)
    tl.store(y + slot.to(tl.int64)[None, :] * out + column[:, None], total, mask=live[None, :] & inside[:, None])


@triton.jit
def combine(y, parts, index, weights, experts, out, top_k, SIZE: tl.constexpr):
    """Sum of a token's parts in the order of its own list."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for k in range(top_k):
        slot = token * top_k + k
        expert = tl.load(index + slot)
        # the outputs of a slot without an expert were never written
        limit = tl.where((expert >= 0) & (expert < experts), out, 0)
        part = tl.load(parts + slot * out + column, mask=column < limit, other=0.0)
        total += tl.where(column < limit, tl.load(weights + slot).to(tl.float32) * part, 0.0)
    tl.store(y + token * out + column, total, mask=column < out)
