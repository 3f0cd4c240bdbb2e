// Products with packed and with 16-bit matrices, written once over the vectors of a path (isa_*.h).
//
// Few rows: weights are unpacked in registers and used at once; memory bandwidth is the limit. Many rows: a group of
// four tiles is unpacked to bytes that stay in the cache, and a block of rows and tiles is summed in registers;
// multiplications are the limit. Both do the same arithmetic in the same order, so a row's result does not depend on
// which rows are computed with it.
#pragma once

#include "floats.h"
#include "scratch.h"
#include "windows.h"

namespace moqa {
namespace {

// Asks for weights that one of Tiles tiles will need: of the tiles after these, into the second cache, or some bytes on.
template <int Width, int Tiles = 1>
MOQA_INLINE void prefetch(const Matrix& m, const Place& place) {
    times<plane_count(Width)>([&](auto n) {
        constexpr int bytes = VECTOR * PLANES[Width][n];
        const size_t ahead = Tiles == 1 ? AHEAD : size_t(m.stride) * bytes * Tiles;
        times<PLANES[Width][n]>([&](auto v) {
            __builtin_prefetch(place.planes[n] + VECTOR * v + ahead, 0, Tiles == 1 ? 3 : 2);
        });
    });
}

// Sums of one row over one tile and group, plane by plane: fields are multiplied where they lie in their bytes, so that
// only the sums are shifted. It needs more multiplications, for which a single row leaves time.
template <class Isa, int Width>
MOQA_INLINE typename Isa::Sums row_sums(const Matrix& m, int tile, int begin, int end, const int8_t* q) {
    // field k and field k + 4 of a plane of single bits share a sum: one shift saves four sums
    typename Isa::Sums sums[plane_count(Width)][4];
    times<plane_count(Width)>([&](auto n) { times<4>([&](auto k) { sums[n][k] = Isa::no_sums(); }); });
    for (int block = begin; block < end; ++block, q += BLOCK) {
        const Place place = place_of<Width>(m, tile, block);
        prefetch<Width>(m, place);
        times<plane_count(Width)>([&](auto n) {
            constexpr int bits = PLANES[Width][n], fields = 8 / bits;
            times<8>([&](auto i) {
                constexpr int field = i % fields, kept = field % 4, moved = field - kept;
                const auto words = Isa::template shift<moved>(Isa::load(place.planes[n] + VECTOR * (i / fields)));
                constexpr uint8_t mask = ((1 << bits) - 1) << (kept * bits);
                sums[n][kept] = Isa::template dot<8>(sums[n][kept], Isa::mask(words, mask), quad_at(q + 4 * i));
            });
        });
    }
    typename Isa::Sums total = Isa::no_sums();
    times<plane_count(Width)>([&](auto n) {
        constexpr int bits = PLANES[Width][n], kept = std::min(8 / bits, 4);
        auto plane = sums[n][0];
        times<kept>([&](auto k) {
            if constexpr (k > 0) plane = Isa::add(plane, Isa::template divide<k * bits>(sums[n][k]));
        });
        total = Isa::add(Isa::template multiply_by<bits>(total), plane);
    });
    return total;
}

template <class Isa, int Width>
void one_row(const Matrix& m, const Rows& x, int first, int last, float* y) {
    const int per_group = m.group / BLOCK;
    for (int tile = first; tile < last; ++tile) {
        auto total = Isa::all(0);
        for (int group = 0; group < m.groups(); ++group) {
            const int begin = group * per_group, end = std::min(m.blocks(), begin + per_group);
            const auto sums = row_sums<Isa, Width>(m, tile, begin, end, x.q + size_t(group) * x.group);
            total = Grid<Isa>(m, tile, group).add(total, sums, x.scale[group], x.sum[group]);
        }
        store_rows<Isa>(m, tile, y + size_t(tile - first) * TILE, total);
    }
}

// Count rows and Tiles tiles that follow each other.
template <class Isa, Code code, int Width, int Count, int Tiles>
MOQA_INLINE void few_rows_of_tiles(const Matrix& m, const Rows& x, int tile, float* y, size_t stride) {
    const int per_group = m.group / BLOCK;
    // at least four sums in all: with fewer, the multiplier would wait for its own result
    constexpr int chains = (3 + Count * Tiles) / (Count * Tiles);
    const Unpacked<Isa, code, Width> unpacked(m, tile);
    typename Isa::Floats total[Count][Tiles];
    times<Count>([&](auto t) { times<Tiles>([&](auto n) { total[t][n] = Isa::all(0); }); });
    for (int group = 0; group < m.groups(); ++group) {
        typename Isa::Sums sums[Count][Tiles][chains];
        times<Count>([&](auto t) {
            times<Tiles>([&](auto n) { times<chains>([&](auto c) { sums[t][n][c] = Isa::no_sums(); }); });
        });
        const size_t at = size_t(group) * Count;
        const int8_t* q = x.q + at * x.group;
        const int end = std::min(m.blocks(), (group + 1) * per_group);
        for (int block = group * per_group; block < end; ++block, q += BLOCK) {
            Place places[Tiles];
            times<Tiles>([&](auto n) {
                places[n] = place_of<Width>(m, tile + n, block);
                if constexpr (Count == 1) prefetch<Width, Tiles>(m, places[n]);
            });
            times<8>([&](auto i) {
                typename Isa::Words words[Tiles];
                vectors<i>(unpacked, places, words);
                times<Count>([&](auto t) {
                    const int32_t quad = quad_at(q + t * x.group + 4 * i);
                    times<Tiles>([&](auto n) {
                        auto& sum = sums[t][n][i % chains];
                        sum = Isa::template dot<unpacked_bits(code, Width)>(sum, words[n], quad);
                    });
                });
            });
        }
        times<Tiles>([&](auto n) {
            const Grid<Isa> grid(m, tile + n, group);
            times<Count>([&](auto t) {
                auto dot = sums[t][n][0];
                times<chains - 1>([&](auto c) { dot = Isa::add(dot, sums[t][n][c + 1]); });
                total[t][n] = grid.add(total[t][n], dot, x.scale[at + t], x.sum[at + t]);
            });
        });
    }
    times<Count>([&](auto t) {
        times<Tiles>([&](auto n) { store_rows<Isa>(m, tile + n, y + t * stride + n * TILE, total[t][n]); });
    });
}

template <class Isa, Code code, int Width, int Count>
void few_rows(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    // levels of a trellis take longer than reading them; others come as fast as memory is read from one end to the other
    constexpr int tiles = Count == 1 && code == Code::trellis ? Isa::STRIP : 1;
    int tile = first;
    for (; tile + tiles <= last; tile += tiles)
        few_rows_of_tiles<Isa, code, Width, Count, tiles>(m, x, tile, y + size_t(tile - first) * TILE, stride);
    for (; tile < last; ++tile)
        few_rows_of_tiles<Isa, code, Width, Count, 1>(m, x, tile, y + size_t(tile - first) * TILE, stride);
}

constexpr int CHUNK = 128;  // rows whose sums stay in the nearest cache

// Sums of Count rows and Tiles tiles over one group of unpacked weights.
template <class Isa, int Bits, int Tiles, int Count>
MOQA_INLINE void register_block(const uint8_t* weights, int quads, const int8_t* q, int group, const Grid<Isa>* grid,
                                const float* scale, const float* sum, float (*totals)[Tiles * TILE]) {
    // loops over these are unrolled by hand: if the compiler kept a loop, it would keep the sums in memory
    typename Isa::Sums sums[Count][Tiles];
    times<Count>([&](auto t) { times<Tiles>([&](auto n) { sums[t][n] = Isa::no_sums(); }); });
    for (int i = 0; i < quads; ++i, weights += Tiles * VECTOR, q += 4) {
        typename Isa::Words words[Tiles];
        times<Tiles>([&](auto n) { words[n] = Isa::load(weights + n * VECTOR); });
        times<Count>([&](auto t) {
            const int32_t quad = quad_at(q + t * group);
            times<Tiles>([&](auto n) { sums[t][n] = Isa::template dot<Bits>(sums[t][n], words[n], quad); });
        });
    }
    times<Count>([&](auto t) {
        times<Tiles>([&](auto n) {
            float* total = totals[t] + n * TILE;
            Isa::store(total, grid[n].add(Isa::load(total), sums[t][n], scale[t], sum[t]));
        });
    });
}

template <class Isa, Code code, int Width, int Tiles>
void many_rows(const Matrix& m, const Rows& x, int row, int count, int tile, float* y, size_t stride) {
    constexpr int block_bytes = 8 * Tiles * VECTOR;
    alignas(64) float totals[CHUNK][Tiles * TILE];
    std::memset(totals, 0, sizeof(totals[0]) * count);
    const int per_group = m.group / BLOCK;
    static thread_local Scratch memory;
    uint8_t* weights = memory.get<uint8_t>(size_t(per_group) * block_bytes);
    for (int group = 0; group < m.groups(); ++group) {
        const int begin = group * per_group, end = std::min(m.blocks(), begin + per_group);
        Grid<Isa> grids[Tiles];
        for (int n = 0; n < Tiles; ++n) {
            grids[n] = Grid<Isa>(m, tile + n, group);
            const Unpacked<Isa, code, Width> unpacked(m, tile + n);
            for (int block = begin; block < end; ++block) {
                const Place place[] = {place_of<Width>(m, tile + n, block)};
                uint8_t* to = weights + size_t(block - begin) * block_bytes + n * VECTOR;
                // all are unpacked before the first is stored: for all the compiler knows, a store changes the planes
                typename Isa::Words words[8][1];
                times<8>([&](auto i) { vectors<i>(unpacked, place, words[i]); });
                times<8>([&](auto i) { Isa::store(to + i * Tiles * VECTOR, words[i][0]); });
            }
        }
        const int quads = (end - begin) * 8;
        int t = 0;
        const auto block_of_rows = [&](auto rows) {
            const size_t at = size_t(group) * x.count + row + t;
            register_block<Isa, unpacked_bits(code, Width), Tiles, rows>(weights, quads, x.q + at * x.group, x.group, grids, x.scale + at,
                                                    x.sum + at, totals + t);
            t += rows;
        };
        while (t + Isa::TOKENS <= count) block_of_rows(std::integral_constant<int, Isa::TOKENS>());
        const int rest = count - t;
        times<Isa::TOKENS>([&](auto rows) {
            if constexpr (rows > 0)
                if (rows == rest) block_of_rows(rows);
        });
    }
    for (int t = 0; t < count; ++t)
        for (int n = 0; n < Tiles; ++n)
            store_rows<Isa>(m, tile + n, y + (row + t) * stride + n * TILE, Isa::load(&totals[t][n * TILE]));
}

template <class Isa, Code code, int Width>
void packed_product(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    if constexpr (code == Code::integers && Isa::PLANE_BY_PLANE)
        if (x.count == 1) return one_row<Isa, Width>(m, x, first, last, y);
    if (x.count <= Isa::FEW) {
        times<Isa::FEW + 1>([&](auto count) {
            if constexpr (count > 0)
                if (count == x.count) few_rows<Isa, code, Width, count>(m, x, first, last, y, stride);
        });
        return;
    }
    for (int row = 0; row < x.count; row += CHUNK) {
        const int count = std::min(CHUNK, x.count - row);
        int tile = first;
        for (; tile + Isa::TILES <= last; tile += Isa::TILES)
            many_rows<Isa, code, Width, Isa::TILES>(m, x, row, count, tile, y + size_t(tile - first) * TILE, stride);
        for (; tile < last; ++tile)
            many_rows<Isa, code, Width, 1>(m, x, row, count, tile, y + size_t(tile - first) * TILE, stride);
    }
}

template <int Count>
void dense_rows(const Matrix& m, const Rows& x, int row, int first, int last, float* y, size_t stride) {
    const int whole = m.in / LANES * LANES;
    for (int r = first * TILE; r < std::min(last * TILE, m.out); ++r) {
        const uint16_t* w = m.dense + size_t(r) * m.stride;
        float sums[Count][LANES] = {};
        for (int i = 0; i < whole; i += LANES)
            for (int t = 0; t < Count; ++t)
                for (int l = 0; l < LANES; ++l) sums[t][l] += from_bfloat16(w[i + l]) * x.values[row + t][i + l];
        for (int t = 0; t < Count; ++t) {
            for (int width = LANES / 2; width > 0; width /= 2)
                for (int l = 0; l < width; ++l) sums[t][l] += sums[t][l + width];
            float total = sums[t][0];
            for (int i = whole; i < m.in; ++i) total += from_bfloat16(w[i]) * x.values[row + t][i];
            y[(row + t) * stride + (r - first * TILE)] = total;
        }
    }
}

inline void dense_product(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    int row = 0;
    for (; row + 4 <= x.count; row += 4) dense_rows<4>(m, x, row, first, last, y, stride);
    for (; row < x.count; ++row) dense_rows<1>(m, x, row, first, last, y, stride);
}

template <class Isa>
void product(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    if (m.width == 16) return dense_product(m, x, first, last, y, stride);
    times<9>([&](auto width) {
        if (width != m.width) return;
        if constexpr (width > 0)
            if (m.code == Code::integers) packed_product<Isa, Code::integers, width>(m, x, first, last, y, stride);
        if constexpr (width > 0 && width <= 4)
            if (m.code == Code::table) packed_product<Isa, Code::table, width>(m, x, first, last, y, stride);
        if constexpr (width > 0 && width <= 3)
            if (m.code == Code::trellis) packed_product<Isa, Code::trellis, width>(m, x, first, last, y, stride);
    });
}

}  // namespace
}  // namespace moqa
