// Levels of coded weights, see moqa/format/levels.py.
#pragma once

#include <cstdint>

namespace moqa {

// Their upper halves, by width.
constexpr int8_t TABLE[5][8] = {{}, {63}, {19, 63}, {7, 22, 39, 63}, {3, 9, 15, 22, 29, 37, 48, 63}};
constexpr int8_t TRELLIS[4][8] = {{}, {19, 63}, {6, 21, 36, 63}, {3, 8, 14, 20, 27, 35, 46, 63}};

// Level `index` of 2 * half levels in ascending order.
constexpr int level_at(const int8_t* upper, int half, int index) {
    return index < half ? -upper[half - 1 - index] : upper[index - half];
}

}  // namespace moqa
