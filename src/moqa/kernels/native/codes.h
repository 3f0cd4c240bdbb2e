// GPTQ's columns in the encodings `table` and `trellis` (moqa/format/levels.py): a column's codes are chosen for the
// least sum of squared errors over its rows, which in the trellis are sequences: rows `apart` follow each other.
#pragma once

#include <limits>

#include "lanes.h"
#include "levels.h"

namespace moqa {
namespace {

// The nearest of every Stride-th level from the first one given: its value, and how many there are below it.
template <int Count>
struct Nearest {
    float level[Count];

    MOQA_INLINE void find(Lanes x, Lanes& value, Bits& number) const {
        value = all(level[0]), number = Bits{};
        times<Count - 1>([&](auto i) {
            const Bits above = x > all((level[i] + level[i + 1]) / 2);
            value = above ? all(level[i + 1]) : value;
            number -= above;
        });
    }
};

template <int Count>
constexpr Nearest<Count> nearest_of(const int8_t* upper, int half, int first, int stride) {
    Nearest<Count> found{};
    for (int i = 0; i < Count; ++i) found.level[i] = float(level_at(upper, half, first + i * stride));
    return found;
}

MOQA_INLINE Bits every(int x) { return x - Bits{}; }

// One vector of a column: what was read, and for each parity of the trellis the best level, its error and number.
struct Step {
    Lanes value, scale;
    Lanes level[4], error[4];
    Bits number[4];
    // Bit 4 b + s is set if, from the state b before all steps, the best way to state s is from its second predecessor.
    Bits from;
};

constexpr float NEVER = std::numeric_limits<float>::infinity();

// Costs of the four states; a state is its two newest coded bits, 2 * c1 + c. Predecessors of 2 * c1 + c are c1 and
// 2 + c1, and the parities on the way are 2 * (c ^ older) + c1.
struct Costs {
    Lanes of[4];

    MOQA_INLINE Bits advance(const Step& step, int begin) {
        const Costs old = *this;
        Bits from{};
        times<4>([&](auto state) {
            constexpr int c1 = state / 2, c = state % 2;
            const Lanes first = old.of[c1] + step.error[2 * c + c1], second = old.of[2 + c1] + step.error[2 * (1 - c) + c1];
            const Bits later = second < first;
            of[state] = later ? second : first;
            from |= later & every(1 << (4 * begin + state));
        });
        return from;
    }

    // Rows beyond the last have code 0.
    MOQA_INLINE void forbid_ones(Bits outside) {
        of[1] = outside ? all(NEVER) : of[1];
        of[3] = outside ? all(NEVER) : of[3];
    }
};

MOQA_INLINE Bits lanes_from(int count) {
    Bits found{};
    for (int l = 0; l < WIDE; ++l) found[l] = l >= count ? -1 : 0;
    return found;
}

// Codes of a column as a trellis whose ends meet: the state before the first step is that after the last one. Each of
// the four is tried.
template <int Width>
MOQA_INLINE void choose_in_trellis(Step* steps, int count, Bits outside, Lanes* chosen, Bits* codes) {
    constexpr int free = 1 << (Width - 1), half = 1 << Width;
    for (int t = 0; t < count; ++t) {
        Step& step = steps[t];
        const Lanes x = step.value / step.scale;
        times<4>([&](auto q) {
            constexpr auto kinds = nearest_of<free>(TRELLIS[Width], half, q, 4);
            kinds.find(x, step.level[q], step.number[q]);
            const Lanes off = step.value - step.level[q] * step.scale;
            step.error[q] = off * off;
        });
        if (t == count - 1)
            times<4>([&](auto q) { step.error[q] = outside ? Lanes{} : step.error[q]; });
    }
    Lanes least_cost{};
    Bits begin{};
    for (int t = 0; t < count; ++t) steps[t].from = Bits{};
    times<4>([&](auto b) {
        Costs costs;
        times<4>([&](auto s) { costs.of[s] = s == b ? Lanes{} : all(NEVER); });
        for (int t = 0; t < count; ++t) steps[t].from |= costs.advance(steps[t], b);
        costs.forbid_ones(outside);
        const Bits less = costs.of[b] < least_cost;
        if constexpr (b == 0) {
            least_cost = costs.of[b];
        } else {
            begin = less ? every(b) : begin;
            least_cost = less ? costs.of[b] : least_cost;
        }
    });
    Bits state = begin;
    const Bits ways = begin * 4;
    for (int t = count - 1; t >= 0; --t) {
        const Step& step = steps[t];
        const Bits older = step.from >> (ways + state) & 1, coded = state & 1, newest = state >> 1;
        const Bits parity = (coded ^ older) * 2 + newest;
        Lanes level = step.level[0];
        Bits number = step.number[0];
        times<3>([&](auto q) {
            const Bits here = parity == every(q + 1);
            level = here ? step.level[q + 1] : level;
            number = here ? step.number[q + 1] : number;
        });
        chosen[t] = level, codes[t] = number * 2 + coded;
        state = newest | older * 2;
    }
}

template <int Width>
MOQA_INLINE void choose_in_table(Step* steps, int count, Lanes* chosen, Bits* codes) {
    constexpr auto kinds = nearest_of<(1 << Width)>(TABLE[Width], 1 << (Width - 1), 0, 1);
    for (int t = 0; t < count; ++t) kinds.find(steps[t].value / steps[t].scale, chosen[t], codes[t]);
}

// Columns first .. first + columns of `Rounding`, the last one first, for the rows `lane` .. `lane` + WIDE of every
// `apart` rows of a part.
template <bool trellis, int Width>
void round_part(const Rounding& r, int matrix, int part, int lane) {
    const int begin = r.begin[part] + lane, end = r.begin[part + 1];
    const int tiles = (r.begin[part + 1] - r.begin[part] + r.apart - 1) / r.apart, wide = std::min(WIDE, r.apart - lane);
    static thread_local Scratch memory, step_memory;
    Lanes* off = memory.get<Lanes>(size_t(tiles) * (r.columns + 1));
    Lanes* chosen = off + size_t(tiles) * r.columns;
    Bits* codes = step_memory.get<Bits>(size_t(tiles) * (1 + sizeof(Step) / sizeof(Bits)));
    Step* steps = reinterpret_cast<Step*>(codes + tiles);
    const auto rows_of = [&](int t) { return std::clamp(end - begin - t * r.apart, 0, wide); };
    const auto read = [&](const float* data, int t) {
        Lanes x{};
        std::memcpy(&x, data + begin + t * r.apart, sizeof(float) * rows_of(t));
        return x;
    };
    const Bits outside = lanes_from(rows_of(tiles - 1));
    for (int k = r.columns - 1; k >= 0; --k) {
        const size_t column = size_t(matrix) * r.in + r.first + k;
        const float* scales = r.scale + (size_t(matrix) * r.groups + size_t(r.order[column]) / r.group) * r.rows;
        const float* values = r.values + (size_t(matrix) * r.columns + k) * r.rows;
        for (int t = 0; t < tiles; ++t) {
            const Lanes scale = read(scales, t);
            // a scale of 0 stands for weights of 0: any other divisor is as good
            steps[t].scale = scale > 0.0f ? scale : all(1.2e-38f);
            steps[t].value = read(values, t);
        }
        if (r.factor != nullptr) {
            const float* factor = r.factor + (size_t(matrix) * r.in + r.first) * r.in + r.first;
            const float diagonal = 1.0f / factor[size_t(k) * r.in + k];
            for (int t = 0; t < tiles; ++t) chosen[t] = Lanes{};
            for (int j = k + 1; j < r.columns; ++j) {
                const float share = factor[size_t(j) * r.in + k] * diagonal;
                const Lanes* later = off + size_t(tiles) * j;
                for (int t = 0; t < tiles; ++t) chosen[t] += later[t] * share;
            }
            for (int t = 0; t < tiles; ++t) steps[t].value += chosen[t];
        }
        if constexpr (trellis)
            choose_in_trellis<Width>(steps, tiles, outside, chosen, codes);
        else
            choose_in_table<Width>(steps, tiles, chosen, codes);
        float* work = r.work + column * r.rows;
        uint8_t* integers = r.integers + (size_t(matrix) * r.in + r.order[column]) * r.rows + begin;
        Lanes* mine = off + size_t(tiles) * k;
        for (int t = 0; t < tiles; ++t) {
            mine[t] = read(work, t) - chosen[t] * (read(scales, t));
            std::memcpy(work + begin + t * r.apart, mine + t, sizeof(float) * rows_of(t));
            for (int l = 0; l < rows_of(t); ++l) integers[t * r.apart + l] = uint8_t(codes[t][l]);
        }
    }
}

void round_codes(const Rounding& r, int matrix, int part, int lane) {
    const int width = r.width[size_t(matrix) * r.parts + part];
    times<5>([&](auto w) {
        if constexpr (w > 0)
            if (w == width && !r.trellis) round_part<false, w>(r, matrix, part, lane);
        if constexpr (w > 0 && w < 4)
            if (w == width && r.trellis) round_part<true, w>(r, matrix, part, lane);
    });
}

}  // namespace
}  // namespace moqa
