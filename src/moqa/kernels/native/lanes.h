// Vectors of the path's own width, with a row in each lane: nothing is ever summed across lanes, so that a row's result
// does not depend on the rows beside it.
#pragma once

#include "floats.h"
#include "scratch.h"
#include "solve.h"

namespace moqa {
namespace {

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif

using Lanes = float __attribute__((vector_size(4 * WIDE)));
using Bits = int32_t __attribute__((vector_size(4 * WIDE)));

MOQA_INLINE Lanes all(float x) { return x - Lanes{}; }
MOQA_INLINE Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
MOQA_INLINE Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
// Adding 1.5 * 2^23 rounds what is smaller than 2^22, to even where two are as near.
MOQA_INLINE Lanes nearest(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

// Four bytes of every row, read from and written to places that are `stride` bytes apart.
MOQA_INLINE Bits gather(const uint8_t* from, size_t stride, int rows) {
    Bits found{};
    for (int l = 0; l < rows; ++l) {
        int32_t four;
        std::memcpy(&four, from + l * stride, 4);
        found[l] = four;
    }
    return found;
}

MOQA_INLINE void scatter(Bits bytes, uint8_t* to, size_t stride, int rows) {
    int32_t fours[WIDE];
    std::memcpy(fours, &bytes, sizeof(fours));
    for (int l = 0; l < rows; ++l) std::memcpy(to + l * stride, fours + l, 4);
}

}  // namespace
}  // namespace moqa
