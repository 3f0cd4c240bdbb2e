// Vectors of the path's own width, with a row in each lane: nothing is ever summed across lanes, so that a row's result
// does not depend on the rows beside it.
#pragma once

#include <utility>

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
// Adding 1.5 * 2^23 rounds numbers below 2^22 to the nearest integer, ties to even.
constexpr float ROUNDER = 12582912.0f;
MOQA_INLINE Lanes nearest(Lanes x) { return (x + ROUNDER) - ROUNDER; }

// The integers 0 .. top, before ROUNDER is subtracted again.
struct Integers {
    Lanes lowest, highest;

    // gcc emits one instruction for a bound that it does not know, and two for one that it knows
    MOQA_INLINE explicit Integers(Lanes top) : lowest(top * 0.0f + ROUNDER), highest(top + ROUNDER) {}

    MOQA_INLINE Lanes nearest(Lanes x) const { return least(most(x + ROUNDER, lowest), highest) - ROUNDER; }
};

// The lanes of the lower halves of two vectors, interleaved, or those of the upper halves.
template <bool upper, size_t... lane>
MOQA_INLINE Bits in_turns(Bits a, Bits b, std::index_sequence<lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * WIDE + upper * (WIDE / 2))...);
#else
    return __builtin_shuffle(a, b, Bits{int32_t(lane / 2 + lane % 2 * WIDE + upper * (WIDE / 2))...});
#endif
}

// A square of WIDE vectors, transposed: every pass moves the highest bit of a vector's number to the end of the lane's,
// and that of the lane's to the end of the vector's.
struct Square {
    Bits of[WIDE];

    MOQA_INLINE void transpose() {
        constexpr std::make_index_sequence<WIDE> lanes{};
        for (int pass = 1; pass < WIDE; pass *= 2) {
            const Square old = *this;
#pragma GCC unroll 16
            for (int i = 0; i < WIDE / 2; ++i) {
                of[2 * i] = in_turns<false>(old.of[i], old.of[i + WIDE / 2], lanes);
                of[2 * i + 1] = in_turns<true>(old.of[i], old.of[i + WIDE / 2], lanes);
            }
        }
    }
};

// Loads `count` times four bytes of every row; rows are `stride` bytes apart, and each four bytes go to one vector.
MOQA_INLINE void gather(const uint8_t* from, size_t stride, int rows, int count, Lanes* to) {
    int i = 0;
    for (; i + WIDE <= count && rows == WIDE; i += WIDE) {
        Square square;
        for (int l = 0; l < WIDE; ++l) std::memcpy(square.of + l, from + 4 * i + l * stride, sizeof(Bits));
        square.transpose();
        for (int l = 0; l < WIDE; ++l) to[i + l] = (Lanes)square.of[l];
    }
    for (; i < count; ++i) {
        Bits four{};
        for (int l = 0; l < rows; ++l) {
            int32_t one;
            std::memcpy(&one, from + 4 * i + l * stride, 4);
            four[l] = one;
        }
        to[i] = (Lanes)four;
    }
}

// The inverse of it.
MOQA_INLINE void scatter(const Lanes* from, int count, uint8_t* to, size_t stride, int rows) {
    int i = 0;
    for (; i + WIDE <= count && rows == WIDE; i += WIDE) {
        Square square;
        for (int l = 0; l < WIDE; ++l) square.of[l] = (Bits)from[i + l];
        square.transpose();
        for (int l = 0; l < WIDE; ++l) std::memcpy(to + 4 * i + l * stride, square.of + l, sizeof(Bits));
    }
    for (; i < count; ++i)
        for (int l = 0; l < rows; ++l) {
            const int32_t four = ((Bits)from[i])[l];
            std::memcpy(to + 4 * i + l * stride, &four, 4);
        }
}

}  // namespace
}  // namespace moqa
