// From planes to vectors of integers, and from sums of integers to values. The code uses the types of a path (isa_*.h)
// and is local to the file that includes it, since every path compiles it with its own instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "levels.h"
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

// From a tile's last plane to that of the tile before, and of the one before that; the first tiles follow the last.
template <int Width>
struct TilesBefore {
    ptrdiff_t before[2];

    MOQA_INLINE TilesBefore(const Matrix& m, int tile) {
        const ptrdiff_t size = ptrdiff_t(m.stride) * VECTOR * PLANES[Width][plane_count(Width) - 1];
        const int tiles = m.tiles();
        for (int n = 0; n < 2; ++n) before[n] = ((tile + 2 * tiles - 1 - n) % tiles - tile) * size;
    }
};

// What a tile's planes hold, as vectors of bytes: integers of a grid, or levels of codes.
template <class Isa, Code code, int Width, bool windows = Isa::WINDOWS && code != Code::integers>
struct Unpacked : TilesBefore<Width> {
    using Words = typename Isa::Words;
    Words table;

    MOQA_INLINE Unpacked(const Matrix& m, int tile) : TilesBefore<Width>(m, tile) {
        constexpr const int8_t* upper = code == Code::trellis ? TRELLIS[Width] : TABLE[Width];
        constexpr int half = code == Code::trellis ? 1 << Width : 1 << (Width - 1);
        alignas(16) uint8_t bytes[16] = {};
        for (int i = 0; i < 2 * half; ++i) bytes[i] = uint8_t(LEVEL_ZERO + level_at(upper, half, i));
        table = Isa::repeated(bytes);
    }

    // Vector I (of 8) of a tile and block, with levels in its bytes.
    template <int I>
    MOQA_INLINE Words vector(const Place& place) const {
        return Isa::lookup(table, vector_of<Isa, Width, I>(place));
    }

    // The same of a trellis, from words of the last plane: of this tile, the one before it, and the one before that.
    template <int I>
    MOQA_INLINE Words vector(const Place& place, Words now, Words newest, Words earlier) const {
        if constexpr (Width == 2) {
            // a field of two bits has the free bit and, below it, the coded one
            constexpr int field = I % 4;
            const Words parity = Isa::difference(now, Isa::mask(earlier, 0x55));
            if constexpr (field == 0 || field == 2) {
                // four bits with room for three: free, parity, newest
                const Words pairs = Isa::template shift<-1>(Isa::mask(parity, 0x33));
                const Words found = Isa::merge(pairs, newest, 0x11);
                return Isa::lookup(table, Isa::mask(Isa::template shift<2 * field>(found), 7));
            } else {
                const Words pairs = Isa::mask(Isa::template shift<1>(parity), 0x66);
                const Words found = Isa::merge(pairs, Isa::template shift<2>(newest), 0x11);
                return Isa::lookup(table, Isa::mask(Isa::template shift<2 * field - 2>(found), 7));
            }
        } else {
            // a plane of coded bits: parity and newest bit of every second field lie in pairs
            const Words parity = Isa::difference(now, earlier);
            const Words pairs = I % 2 ? Isa::merge(Isa::mask(parity, 0xAA), Isa::template shift<1>(newest), 0x55)
                                      : Isa::merge(Isa::mask(Isa::template shift<-1>(parity), 0xAA), newest, 0x55);
            const Words low = Isa::mask(Isa::template shift<I / 2 * 2>(pairs), 3);
            if constexpr (Width == 1) return Isa::lookup(table, low);
            const Words free = Isa::load(place.planes[0] + VECTOR * (I / 4));
            return Isa::lookup(table, Isa::merge(low, Isa::template shift<I % 4 * 2 - 2>(free), 12));
        }
    }
};

template <class Isa, int Width>
struct Unpacked<Isa, Code::integers, Width, false> {
    MOQA_INLINE Unpacked(const Matrix&, int) {}

    template <int I>
    MOQA_INLINE typename Isa::Words vector(const Place& place) const {
        return vector_of<Isa, Width, I>(place);
    }
};

// Vector I of each of some tiles that follow each other. Of a trellis, every tile's words are loaded once, though the
// levels of three tiles depend on them.
template <int I, class Isa, Code code, int Width, int Tiles>
MOQA_INLINE void vectors(const Unpacked<Isa, code, Width>& unpacked, const Place (&places)[Tiles],
                         typename Isa::Words (&found)[Tiles]) {
    if constexpr (code == Code::trellis) {
        constexpr int last = plane_count(Width) - 1, offset = Width == 2 ? VECTOR * (I / 4) : 0;
        typename Isa::Words coded[Tiles + 2];
        times<2>([&](auto n) { coded[n] = Isa::load(places[0].planes[last] + offset + unpacked.before[1 - n]); });
        times<Tiles>([&](auto n) {
            coded[n + 2] = Isa::load(places[n].planes[last] + offset);
            found[n] = unpacked.template vector<I>(places[n], coded[n + 2], coded[n + 1], coded[n]);
        });
    } else {
        times<Tiles>([&](auto n) { found[n] = unpacked.template vector<I>(places[n]); });
    }
}

// Bits of these integers.
constexpr int unpacked_bits(Code code, int width) { return code == Code::integers ? width : 7; }

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
        if (m.code == Code::integers) {
            scale = Isa::scales(m.scale + index, m.half);
            zero = m.zero ? Isa::multiply(Isa::bytes(m.zero + index), Isa::all(m.zero_step())) : Isa::all(m.middle());
        } else {
            const auto factor = Isa::factors(m.zero + index / TILE * FACTOR_BYTES);
            scale = Isa::multiply(Isa::scales(m.scale + size_t(tile) * TILE, m.half), factor);
            zero = Isa::all(LEVEL_ZERO);
        }
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
