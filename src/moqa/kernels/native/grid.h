// The grid of a group of weights, with a row in each lane of a vector.
#pragma once

#include "lanes.h"
#include "packing.h"

namespace moqa {
namespace {

// float16 of numbers that are not negative, and back.
MOQA_INLINE Bits to_half(Lanes x) {
    const Bits bits = (Bits)x;
    const Bits small = (Bits)(x + 0.5f) - 0x3f000000;  // below the normal range: adding 0.5 aligns them
    const Bits normal = (bits - (112 << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    return bits >= 0x47800000 ? Bits{} + 0x7c00 : bits < 0x38800000 ? small : normal;
}

MOQA_INLINE Lanes from_half(Bits half) {
    const Lanes small = __builtin_convertvector(half, Lanes) * 5.9604645e-8f;
    const Lanes normal = (Lanes)((half << 13) + (112 << 23));
    return half >= 0x7c00 ? all(INFINITY) : half < 0x400 ? small : normal;
}

// Factors by which a group's range is shrunk in the search for its grid.
constexpr float SHRINKS[] = {1.0f, 0.95f, 0.9f, 0.82f, 0.72f, 0.6f};
constexpr int CANDIDATES = sizeof(SHRINKS) / sizeof(float);

// Values that depend only on the widths of some rows, so that divisions are not repeated for each group.
struct LaneWidths {
    Lanes top;                 // the largest integer
    Integers integers;
    Lanes zeros, offsets;      // steps of a zero-point in one of integers, and the other way round
    Lanes steps[CANDIDATES];   // share of the range that a step is

    MOQA_INLINE explicit LaneWidths(Lanes top)
        : top(top), integers(top), zeros(255.0f / top), offsets(top / 255.0f) {
        for (int i = 0; i < CANDIDATES; ++i) steps[i] = SHRINKS[i] / top;
    }
};

// A grid for the same group of some rows.
struct LaneGrid {
    Bits stored;  // scale as it is stored
    Lanes scale, inverse, zero, offset;

    MOQA_INLINE void take(const LaneGrid& other, Bits where) {
        stored = where ? other.stored : stored;
        scale = where ? other.scale : scale;
        inverse = where ? other.inverse : inverse;
        zero = where ? other.zero : zero;
        offset = where ? other.offset : offset;
    }
};

// Sums over steps = integer - offset of a grid's integers, for the best scale and offset.
struct LaneSums {
    Lanes steps, squares, products;

    MOQA_INLINE void take(const LaneSums& other, Bits where) {
        steps = where ? other.steps : steps;
        squares = where ? other.squares : squares;
        products = where ? other.products : products;
    }
};

// Weights of a group of some rows, and what the search needs of them. `weighted`: squared errors have weights.
template <bool weighted>
struct LaneGroup {
    const Lanes* x;       // [size]
    const float* weight;  // [size] of each squared error
    int size;
    const LaneWidths& widths;
    bool symmetric, half;
    Lanes sum_x{}, energy{};
    float sum = 0;

    MOQA_INLINE void prepare() {
        for (int i = 0; i < size; ++i) {
            const Lanes wx = scaled(x[i], i);
            sum_x += wx;
            energy += wx * x[i];
            sum += weighted ? weight[i] : 1.0f;
        }
    }

    MOQA_INLINE Lanes scaled(Lanes value, int i) const {
        if constexpr (weighted) return value * weight[i];
        return value;
    }

    // The grid as it is stored; `low` is the value of integer zero.
    MOQA_INLINE LaneGrid grid(Lanes scale, Lanes low) const {
        LaneGrid g;
        if (half) {
            g.stored = to_half(scale);
            g.scale = from_half(g.stored);
        } else {
            const Bits bits = (Bits)scale;
            g.stored = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
            g.scale = (Lanes)(g.stored << 16);
        }
        const Bits usable = (g.scale >= 1.2e-38f) & (g.scale < INFINITY);
        g.inverse = usable ? 1.0f / g.scale : Lanes{};
        if (symmetric) {
            g.zero = Lanes{};
            g.offset = (widths.top + 1.0f) * 0.5f;
        } else {
            g.zero = nearest(least(most(-low * g.inverse * widths.zeros, Lanes{}), all(255.0f)));
            g.offset = g.zero * widths.offsets;
        }
        return g;
    }

    MOQA_INLINE Lanes place(const LaneGrid& g, int i) const { return x[i] * g.inverse + g.offset; }
    MOQA_INLINE Lanes integer(Lanes place) const { return widths.integers.nearest(place); }

    // Squared error of a grid, from the squared distances between integers and positions in units of its scale.
    MOQA_INLINE Lanes error(const LaneGrid& g, Lanes squares) const {
        const Bits usable = g.inverse > 0.0f, none = g.scale < 1.0f;
        return usable ? squares * g.scale * g.scale : none ? energy : all(INFINITY);
    }

    template <int count>
    MOQA_INLINE void errors(const LaneGrid* grids, Lanes* found) const {
        Lanes squares[count] = {};
        for (int i = 0; i < size; ++i)
            for (int c = 0; c < count; ++c) {
                const Lanes at = place(grids[c], i), off = integer(at) - at;
                squares[c] += scaled(off, i) * off;
            }
        for (int c = 0; c < count; ++c) found[c] = error(grids[c], squares[c]);
    }

    MOQA_INLINE LaneSums sums(const LaneGrid& g, Lanes& found) const {
        LaneSums s{};
        Lanes squares{};
        for (int i = 0; i < size; ++i) {
            const Lanes at = place(g, i), q = integer(at), off = q - at, step = q - g.offset, weighed = scaled(step, i);
            squares += scaled(off, i) * off;
            s.steps += weighed;
            s.squares += weighed * step;
            s.products += weighed * x[i];
        }
        found = error(g, squares);
        return s;
    }

    // Least-squares scale, and offset if there is one, for the integers that a grid chooses.
    MOQA_INLINE LaneGrid refit(const LaneGrid& g, const LaneSums& s) const {
        const Lanes mean = symmetric ? Lanes{} : s.steps / sum, mean_x = symmetric ? Lanes{} : sum_x / sum;
        const Lanes spread = s.squares - mean * s.steps, along = s.products - mean * sum_x;
        // rounding errors of equal steps are not a spread
        const Lanes slope = spread > 1e-5f * s.squares ? most(along / spread, Lanes{}) : g.scale;
        return grid(slope, mean_x - slope * (mean + g.offset));
    }
};

// Searches shrunken ranges, then refits; moqa/kernels/fitting.py does the same in torch.
template <bool weighted>
MOQA_INLINE LaneGrid search(const LaneGroup<weighted>& group, Lanes& error) {
    constexpr int together = 3, refits = 3;
    Lanes low{}, high{};
    for (int i = 0; i < group.size; ++i) {
        low = least(low, group.x[i]);
        high = most(high, group.x[i]);
    }
    if (group.symmetric) {
        high = most(-low, high);
        low = -high * (group.widths.top + 1.0f) / most(group.widths.top - 1.0f, all(1.0f));
    }
    LaneGrid grids[CANDIDATES], best;
    Lanes errors[CANDIDATES];
    for (int i = 0; i < CANDIDATES; ++i) grids[i] = group.grid((high - low) * group.widths.steps[i], low * SHRINKS[i]);
    for (int i = 0; i < CANDIDATES; i += together) group.template errors<together>(grids + i, errors + i);
    best = grids[0];
    error = errors[0];
    for (int i = 1; i < CANDIDATES; ++i) {
        const Bits better = errors[i] < error;
        best.take(grids[i], better);
        error = better ? errors[i] : error;
    }
    Lanes found;
    LaneSums sums = group.sums(best, found);
    for (int i = 1; i <= refits; ++i) {
        const LaneGrid other = group.refit(best, sums);
        LaneSums others = sums;
        if (i < refits) others = group.sums(other, found);
        else group.template errors<1>(&other, &found);
        const Bits better = found < error;
        best.take(other, better);
        sums.take(others, better);
        error = better ? found : error;
        int any = 0;
        for (int l = 0; l < WIDE; ++l) any |= better[l];
        if (!any) break;  // the next refit would be the same
    }
    return best;
}

// Columns begin .. begin + size of some rows, transposed.
MOQA_INLINE void transpose(const Fitting& f, size_t row, int rows, int begin, int size, Lanes* x) {
    const size_t itemsize = f.bfloat16 ? 2 : 4;
    const auto* from = static_cast<const uint8_t*>(f.weights) + (row * f.in + begin) * itemsize;
    const size_t stride = f.in * itemsize;
    if (!f.bfloat16) return gather(from, stride, rows, size, x);
    // pairs of columns come to lie in the second half, and are taken apart from the first one on
    const int pairs = size / 2;
    Lanes* two = x + pairs;
    if (size % 2) {
        Lanes last{};
        for (int l = 0; l < rows; ++l) {
            uint16_t value;
            std::memcpy(&value, from + 2 * (size - 1) + l * stride, 2);
            last[l] = from_bfloat16(value);
        }
        x[size - 1] = last;
    }
    gather(from, stride, rows, pairs, two);
    for (int i = 0; i < pairs; ++i) {
        const Bits pair = (Bits)two[i];
        x[2 * i] = (Lanes)(pair << 16);
        x[2 * i + 1] = (Lanes)(pair & int32_t(0xffff0000));
    }
}

// Up to four columns' integers, a byte for each.
MOQA_INLINE Bits four(const Lanes* q, int count) {
    Bits found = __builtin_convertvector(q[0], Bits);
    for (int i = 1; i < count; ++i) found |= __builtin_convertvector(q[i], Bits) << (8 * i);
    return found;
}

// Integers of columns begin .. begin + size of some rows, from vectors of one column each, which are overwritten.
MOQA_INLINE void put_integers(Lanes* q, const Fitting& f, size_t row, int rows, int begin, int size) {
    uint8_t* to = f.integers + row * f.in + begin;
    for (int i = size / 4 * 4; i < size; ++i)
        for (int l = 0; l < rows; ++l) to[l * f.in + i] = uint8_t(q[i][l]);
    for (int i = 0; i < size / 4; ++i) q[i] = (Lanes)four(q + 4 * i, 4);
    scatter(q, size / 4, to, f.in, rows);
}

// The same into planes.
MOQA_INLINE void put_planes(const Lanes* q, const Fitting& f, size_t row, int rows, int begin, int size) {
    Bits there;
    for (int l = 0; l < WIDE; ++l) there[l] = l < rows ? -1 : 0;
    const int blocks = (f.in + BLOCK - 1) / BLOCK;
    const size_t first = row / TILE * blocks + begin / BLOCK;
    for (int block = 0; block < (size + BLOCK - 1) / BLOCK; ++block) {
        Bits fours[FOURS] = {};
        const Lanes* from = q + block * BLOCK;
        const int count = std::min(BLOCK, size - block * BLOCK);
        for (int j = 0; j < count / 4; ++j) fours[j] = four(from + 4 * j, 4) & there;
        if (count % 4) fours[count / 4] = four(from + count / 4 * 4, count % 4) & there;
        put_block(fours, f.width[row], first + block, int(row % TILE), f.planes);
    }
}

template <bool weighted>
MOQA_INLINE void fit_rows(const Fitting& f, size_t row, int rows, const float* importance, Lanes* x, float* weight) {
    const int groups = f.groups();
    Lanes top = all(1.0f);
    for (int l = 0; l < rows; ++l) top[l] = float((1 << f.width[row + l]) - 1);
    const LaneWidths widths(top);
    for (int g = 0; g < groups; ++g) {
        const int begin = g * f.group, size = std::min(f.group, f.in - begin);
        transpose(f, row, rows, begin, size, x);
        if (weighted) {
            float sum = 0;
            for (int i = 0; i < size; ++i) sum += importance[begin + i];
            // a group whose inputs were never active has no importance: equal weights keep its fit well defined
            const float floor = std::max(sum / float(f.group), 1e-12f) * 1e-2f;
            for (int i = 0; i < size; ++i) weight[i] = floor + importance[begin + i];
        }
        LaneGroup<weighted> group{x, weight, size, widths, f.symmetric, f.half};
        group.prepare();
        Lanes error;
        const LaneGrid best = search(group, error);
        for (int i = 0; i < size; ++i) x[i] = group.integer(group.place(best, i));
        const bool packed = f.planes[0] != nullptr;
        if (packed) put_planes(x, f, row, rows, begin, size);
        else put_integers(x, f, row, rows, begin, size);
        for (int l = 0; l < rows; ++l) {
            const size_t r = row + l, at = packed ? (r / TILE * groups + g) * TILE + r % TILE : r * groups + g;
            f.scale[at] = uint16_t(best.stored[l]);
            if (f.zero != nullptr) f.zero[at] = uint8_t(best.zero[l]);
            if (!packed) f.error[at] = error[l];
        }
    }
}

void fit(const Fitting& f, int matrix, int tile) {
    static thread_local Scratch memory;
    Lanes* x = memory.get<Lanes>(f.group + f.group / WIDE + 1);
    auto* weight = reinterpret_cast<float*>(x + f.group);
    const float* importance = f.importance == nullptr ? nullptr : f.importance + size_t(matrix) * f.in;
    for (int first = tile * TILE, end = std::min(first + TILE, f.rows); first < end; first += WIDE) {
        const size_t row = size_t(matrix) * f.rows + first;
        const int rows = std::min(WIDE, end - first);
        if (importance == nullptr) fit_rows<false>(f, row, rows, importance, x, weight);
        else fit_rows<true>(f, row, rows, importance, x, weight);
    }
}

}  // namespace
}  // namespace moqa
