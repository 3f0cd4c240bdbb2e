// GPTQ's columns.
#pragma once

#include "lanes.h"

namespace moqa {
namespace {

// Columns first .. first + columns of `Rounding`, the last one first, for some vectors of rows: enough sums that none
// waits for another.
void round(const Rounding& r, int matrix, int item) {
    constexpr int tiles = ROUND_ROWS / WIDE;
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
        Lanes taken[tiles] = {};
        for (int j = k + 1; j < r.columns; ++j) {
            const float share = factor[size_t(j) * r.in + k];
            for (int t = 0; t < tiles; ++t) taken[t] += off[j][t] * share;
        }
        const float diagonal = 1.0f / factor[size_t(k) * r.in + k];
        for (int t = 0; t < tiles; ++t) value[t] += taken[t] * diagonal;
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

}  // namespace
}  // namespace moqa
