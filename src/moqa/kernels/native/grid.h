// The two loops of quantization: the grid of a group of weights, and GPTQ's columns. Sixteen rows lie in the lanes of a
// vector, so that nothing is ever summed across lanes and a row's result does not depend on the rows beside it.
#pragma once

#include "floats.h"
#include "scratch.h"
#include "solve.h"

namespace moqa {
namespace {

using Lanes = float __attribute__((vector_size(4 * TILE)));
using Bits = int32_t __attribute__((vector_size(4 * TILE)));

MOQA_INLINE Lanes all(float x) { return x - Lanes{}; }
MOQA_INLINE Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
MOQA_INLINE Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
// Adding 1.5 * 2^23 rounds what is smaller than 2^22, to even where two are as near.
MOQA_INLINE Lanes nearest(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

MOQA_INLINE uint16_t to_half(float x) {
    const uint32_t bits = uint32_t(bits_of(x)), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // too large: infinite
    if (size < 0x38800000) {                                 // what is below the normal range: adding 0.5 aligns it
        const float aligned = float_of(int32_t(size)) + 0.5f;
        return uint16_t(sign | uint32_t(bits_of(aligned) - bits_of(0.5f)));
    }
    return uint16_t(sign | ((size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13));
}

MOQA_INLINE float from_half(uint32_t bits) {
    const uint32_t size = bits & 0x7fff;
    float x;
    if (size >= 0x7c00) x = INFINITY;
    else if (size < 0x400) x = float(size) * 5.9604645e-8f;
    else x = float_of(int32_t((size << 13) + (112u << 23)));
    return bits & 0x8000 ? -x : x;
}

// A grid for the same group of sixteen rows.
struct LaneGrid {
    Bits stored;  // scale as it is stored
    Lanes scale, inverse, zero, offset;
};

// Weights of a group of sixteen rows, and what the search needs of them.
struct LaneGroup {
    const Lanes* x;       // [size]
    const float* weight;  // [size] of each squared error
    int size;
    Lanes top;
    bool symmetric, half;

    // The grid as it can be stored: `low` is what lies at integer zero.
    MOQA_INLINE LaneGrid grid(Lanes scale, Lanes low) const {
        LaneGrid g;
        if (half) {
            for (int l = 0; l < TILE; ++l) {
                g.stored[l] = to_half(scale[l]);
                g.scale[l] = from_half(uint32_t(g.stored[l]));
            }
        } else {
            const Bits bits = (Bits)scale;
            g.stored = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
            g.scale = (Lanes)(g.stored << 16);
        }
        const Bits usable = (g.scale >= 1.2e-38f) & (g.scale < INFINITY);
        g.inverse = usable ? 1.0f / g.scale : Lanes{};
        if (symmetric) {
            g.zero = Lanes{};
            g.offset = (top + 1.0f) * 0.5f;
        } else {
            g.zero = nearest(least(most(-low * g.inverse * (255.0f / top), Lanes{}), all(255.0f)));
            g.offset = g.zero * (top / 255.0f);
        }
        return g;
    }

    MOQA_INLINE Lanes integer(const LaneGrid& g, int i) const {
        return nearest(least(most(x[i] * g.inverse + g.offset, Lanes{}), top));
    }

    MOQA_INLINE Lanes error(const LaneGrid& g) const {
        Lanes total{};
        for (int i = 0; i < size; ++i) {
            const Lanes off = g.scale * (integer(g, i) - g.offset) - x[i];
            total += off * off * weight[i];
        }
        return total;
    }

    // Least-squares scale, and offset if there is one, for the integers that a grid chooses; q is memory for them.
    MOQA_INLINE LaneGrid refit(const LaneGrid& g, Lanes* q) const {
        Lanes mean_q = g.offset, mean_x{};
        if (symmetric) {
            for (int i = 0; i < size; ++i) q[i] = integer(g, i);
        } else {
            Lanes sum_q{}, sum_x{};
            float sum = 0;
            for (int i = 0; i < size; ++i) {
                q[i] = integer(g, i);
                sum_q += q[i] * weight[i];
                sum_x += x[i] * weight[i];
                sum += weight[i];
            }
            mean_q = sum_q / sum;
            mean_x = sum_x / sum;
        }
        Lanes spread{}, along{};
        for (int i = 0; i < size; ++i) {
            const Lanes centred = q[i] - mean_q, weighted = centred * weight[i];
            spread += weighted * centred;
            along += weighted * x[i];
        }
        const Lanes slope = spread > 0.0f ? most(along / spread, Lanes{}) : g.scale;
        return grid(slope, mean_x - slope * mean_q);
    }
};

// Searches shrunken ranges, then refits; see moqa/kernels/fitting.py, which says the same in torch.
MOQA_INLINE LaneGrid search(const LaneGroup& group, Lanes* q, Lanes& error) {
    constexpr float shrinks[] = {1.0f, 0.95f, 0.9f, 0.82f, 0.72f, 0.6f};
    constexpr int refits = 3;
    Lanes low{}, high{};
    for (int i = 0; i < group.size; ++i) {
        low = least(low, group.x[i]);
        high = most(high, group.x[i]);
    }
    if (group.symmetric) {
        high = most(-low, high);
        low = -high * (group.top + 1.0f) / most(group.top - 1.0f, all(1.0f));
    }
    LaneGrid best = group.grid((high - low) * (1.0f / group.top), low);
    error = group.error(best);
    const auto improve = [&](const LaneGrid& other) {
        const Lanes found = group.error(other);
        const Bits better = found < error;
        error = better ? found : error;
        best.stored = better ? other.stored : best.stored;
        best.scale = better ? other.scale : best.scale;
        best.inverse = better ? other.inverse : best.inverse;
        best.zero = better ? other.zero : best.zero;
        best.offset = better ? other.offset : best.offset;
        int any = 0;
        for (int l = 0; l < TILE; ++l) any |= better[l];
        return any != 0;
    };
    for (int i = 1; i < int(sizeof(shrinks) / sizeof(float)); ++i)
        improve(group.grid((high - low) * (shrinks[i] / group.top), low * shrinks[i]));
    // a refit that improves no row would be found again
    for (int i = 0; i < refits && improve(group.refit(best, q)); ++i) {
    }
    return best;
}

void fit(const Fitting& f, int matrix, int tile) {
    const int first = tile * TILE, rows = std::min(TILE, f.rows - first), groups = f.groups();
    const size_t row = size_t(matrix) * f.rows + first;
    const float* importance = f.importance == nullptr ? nullptr : f.importance + size_t(matrix) * f.in;
    static thread_local Scratch memory;
    Lanes* x = memory.get<Lanes>(2 * f.group + f.group / TILE + 1);
    Lanes* q = x + f.group;
    auto* weight = reinterpret_cast<float*>(q + f.group);
    Lanes top = all(1.0f);
    for (int l = 0; l < rows; ++l) top[l] = float((1 << f.width[row + l]) - 1);
    for (int g = 0; g < groups; ++g) {
        const int begin = g * f.group, size = std::min(f.group, f.in - begin);
        for (int i = 0; i < size; ++i) x[i] = Lanes{};
        for (int l = 0; l < rows; ++l) {
            auto* lane = reinterpret_cast<float*>(x) + l;
            const size_t at = (row + l) * f.in + begin;
            if (f.bfloat16)
                for (int i = 0; i < size; ++i) lane[i * TILE] = from_bfloat16(static_cast<const uint16_t*>(f.weights)[at + i]);
            else
                for (int i = 0; i < size; ++i) lane[i * TILE] = static_cast<const float*>(f.weights)[at + i];
        }
        float floor = 1.0f;  // a group whose inputs were never active has no preference: equal weights keep it sane
        if (importance != nullptr) {
            float sum = 0;
            for (int i = 0; i < size; ++i) sum += importance[begin + i];
            floor = std::max(sum / float(f.group), 1e-12f) * 1e-2f;
        }
        for (int i = 0; i < size; ++i) weight[i] = floor + (importance == nullptr ? 0.0f : importance[begin + i]);
        const LaneGroup group{x, weight, size, top, f.symmetric, f.half};
        Lanes error;
        const LaneGrid best = search(group, q, error);
        for (int i = 0; i < size; ++i) q[i] = group.integer(best, i);
        for (int l = 0; l < rows; ++l) {
            const size_t at = (row + l) * groups + g;
            f.scale[at] = uint16_t(best.stored[l]);
            if (f.zero != nullptr) f.zero[at] = uint8_t(best.zero[l]);
            f.error[at] = error[l];
            uint8_t* to = f.integers + (row + l) * f.in + begin;
            for (int i = 0; i < size; ++i) to[i] = uint8_t(reinterpret_cast<float*>(q + i)[l]);
        }
    }
}

// Columns first .. first + columns of `Rounding`, the last one first, for 4 tiles of rows: enough sums that none waits
// for another.
void round(const Rounding& r, int matrix, int item) {
    constexpr int tiles = ROUND_ROWS / TILE;
    const int from = item * ROUND_ROWS, rows = std::min(ROUND_ROWS, r.rows - from);
    static thread_local Scratch memory;
    Lanes(*off)[tiles] = reinterpret_cast<Lanes(*)[tiles]>(memory.get<Lanes>(tiles * (r.columns + 4)));
    Lanes *value = off[r.columns], *scale = value + tiles, *offset = scale + tiles, *top = offset + tiles;
    const auto read = [&](Lanes* to, const float* data) {
        for (int t = 0; t < tiles; ++t) to[t] = Lanes{};
        std::memcpy(to, data + from, sizeof(float) * rows);
    };
    read(top, r.top + size_t(matrix) * r.rows);
    const float* factor = r.factor + (size_t(matrix) * r.in + r.first) * r.in + r.first;
    for (int k = r.columns - 1; k >= 0; --k) {
        const size_t column = size_t(matrix) * r.in + r.first + k;
        const size_t group = (size_t(matrix) * r.groups + size_t(r.order[column]) / r.group) * r.rows;
        read(value, r.values + (size_t(matrix) * r.columns + k) * r.rows);
        read(scale, r.scale + group);
        read(offset, r.offset + group);
        for (int j = k + 1; j < r.columns; ++j) {
            const float share = factor[size_t(j) * r.in + k];
            for (int t = 0; t < tiles; ++t) value[t] += off[j][t] * share;
        }
        float* work = r.work + column * r.rows;
        uint8_t* integers = r.integers + (size_t(matrix) * r.in + r.order[column]) * r.rows + from;
        read(off[k], work);
        for (int t = 0; t < tiles; ++t) {
            const Lanes inverse = scale[t] >= 1.2e-38f ? 1.0f / scale[t] : Lanes{};
            value[t] = nearest(least(most(value[t] * inverse + offset[t], Lanes{}), top[t]));
            off[k][t] -= scale[t] * (value[t] - offset[t]);
        }
        std::memcpy(work + from, off[k], sizeof(float) * rows);
        for (int i = 0; i < rows; ++i) integers[i] = uint8_t(reinterpret_cast<float*>(value)[i]);
    }
}

void pack(const Packing& p, int tile) {
    const int first = tile * TILE, rows = std::min(TILE, p.rows - first);
    alignas(64) uint8_t vectors[8][VECTOR] = {};
    for (int block = 0; block < p.blocks(); ++block) {
        const int begin = block * BLOCK, size = std::min(BLOCK, p.in - begin);
        if (size < BLOCK) std::memset(vectors, 0, sizeof(vectors));
        for (int r = 0; r < rows; ++r) {
            const uint8_t* from = p.integers + size_t(first + r) * p.in + begin;
            for (int i = 0; i < size; ++i) vectors[i / 4][4 * r + i % 4] = from[i];
        }
        int low = p.width;
        for (int n = 0; n < plane_count(p.width); ++n) {
            const int bits = PLANES[p.width][n], fields = 8 / bits, mask = (1 << bits) - 1;
            low -= bits;
            uint8_t* to = p.planes[n] + (size_t(tile) * p.blocks() + block) * VECTOR * bits;
            for (int j = 0; j < bits; ++j, to += VECTOR) {
                std::memset(to, 0, VECTOR);
                for (int k = 0; k < fields; ++k)
                    for (int i = 0; i < VECTOR; ++i)
                        to[i] = uint8_t(to[i] | (vectors[fields * j + k][i] >> low & mask) << (bits * k));
            }
        }
    }
}

}  // namespace
}  // namespace moqa
