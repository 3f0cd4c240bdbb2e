// From planes to vectors of integers, and from sums of integers to values. The code uses the types of a path (isa_*.h)
// and is local to the file that includes it, since every path compiles it with its own instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "path.h"

#define MOQA_INLINE __attribute__((always_inline)) inline

namespace moqa {
namespace {

template <int... I, class F>
MOQA_INLINE void each(std::integer_sequence<int, I...>, F&& body) {
    (body(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
MOQA_INLINE void times(F&& body) {
    each(std::make_integer_sequence<int, N>{}, body);
}

constexpr int plane_count(int width) {
    return (PLANES[width][0] > 0) + (PLANES[width][1] > 0) + (PLANES[width][2] > 0);
}

// Distance in bytes at which weights are prefetched: the processor's own prefetching is too short for weights that are
// used as fast as they arrive.
constexpr int AHEAD = 8192;

// Addresses of the packed bytes of one tile and block, for each plane.
struct Place {
    const uint8_t* planes[3];
};

template <int Width>
MOQA_INLINE Place place_of(const Matrix& m, int tile, int block) {
    Place place{};
    const size_t index = size_t(tile) * m.stride + block;
    for (int n = 0; n < plane_count(Width); ++n) place.planes[n] = m.planes[n] + index * VECTOR * PLANES[Width][n];
    return place;
}

// Vector I (of 8) of a tile and block, with whole integers in its bytes.
template <class Isa, int Width, int I>
MOQA_INLINE typename Isa::Words vector_of(const Place& place) {
    typename Isa::Words total{};
    times<plane_count(Width)>([&](auto n) {
        constexpr int bits = PLANES[Width][n], fields = 8 / bits;
        constexpr int low = Width - PLANES[Width][0] - (n > 0 ? PLANES[Width][1] : 0) - (n > 1 ? PLANES[Width][2] : 0);
        const auto packed = Isa::load(place.planes[n] + VECTOR * (I / fields));
        const auto moved = Isa::template shift<(I % fields) * bits - low>(packed);
        constexpr uint8_t mask = ((1 << bits) - 1) << low;
        total = n == 0 ? Isa::mask(moved, mask) : Isa::merge(total, moved, mask);
    });
    return total;
}

MOQA_INLINE int32_t quad_at(const int8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, 4);
    return quad;
}

// Scale and zero-point of a tile's rows in one group.
template <class Isa>
struct Grid {
    typename Isa::Floats scale, zero;

    Grid() = default;
    MOQA_INLINE Grid(const Matrix& m, int tile, int group) {
        const size_t index = (size_t(tile) * m.groups() + group) * TILE;
        scale = Isa::scales(m.scale + index, m.half);
        zero = m.zero ? Isa::multiply(Isa::bytes(m.zero + index), Isa::all(m.zero_step())) : Isa::all(m.middle());
    }

    // total + weight scale * (activation scale * dot - zero * activation sum)
    MOQA_INLINE typename Isa::Floats add(typename Isa::Floats total, typename Isa::Sums dot, float x, float sum) const {
        const auto product = Isa::multiply(Isa::to_float(dot), Isa::all(x));
        return Isa::add_product(total, scale, Isa::subtract_product(product, zero, Isa::all(sum)));
    }
};

template <class Isa>
MOQA_INLINE void store_rows(const Matrix& m, int tile, float* y, typename Isa::Floats values) {
    const int rows = m.out - tile * TILE;
    if (rows >= TILE) return Isa::store(y, values);
    float whole[TILE];
    Isa::store(whole, values);
    std::memcpy(y, whole, rows * sizeof(float));
}

}  // namespace
}  // namespace moqa
