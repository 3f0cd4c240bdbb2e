// The kernels of a path, written once over its vectors (isa_*.h).
//
// Few rows: weights are unpacked in registers and used at once; memory bandwidth is the limit. Many rows: a group of
// four tiles is unpacked to bytes that stay in the cache, and a block of rows and tiles is summed in registers;
// multiplications are the limit. Both do the same arithmetic in the same order, so a row's result does not depend on
// which rows are computed with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "path.h"
#include "scratch.h"

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

// Bytes by which weights are asked for before they are used: the processor's own prefetching runs too short for
// weights that are used as fast as they come.
constexpr int AHEAD = 8192;

// Where the packed bytes of one tile and block begin, for each plane.
struct Place {
    const uint8_t* planes[3];
};

template <int Width>
MOQA_INLINE Place place_of(const Matrix& m, int tile, int block) {
    Place place{};
    const size_t index = size_t(tile) * m.blocks() + block;
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

// Sums of one row over one tile and group, plane by plane: fields are multiplied where they lie in their bytes, so that
// nothing is shifted but the sums. It multiplies more often, which a single row leaves time for.
template <class Isa, int Width>
MOQA_INLINE typename Isa::Sums row_sums(const Matrix& m, int tile, int begin, int end, const int8_t* q) {
    // field k and field k + 4 of a plane of single bits share a sum: that one shift spares four sums
    typename Isa::Sums sums[plane_count(Width)][4];
    times<plane_count(Width)>([&](auto n) { times<4>([&](auto k) { sums[n][k] = Isa::no_sums(); }); });
    for (int block = begin; block < end; ++block, q += BLOCK) {
        const Place place = place_of<Width>(m, tile, block);
        times<plane_count(Width)>([&](auto n) {
            constexpr int bits = PLANES[Width][n], fields = 8 / bits;
            times<bits>([&](auto v) { __builtin_prefetch(place.planes[n] + VECTOR * v + AHEAD); });
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

template <class Isa, int Width, int Count>
void few_rows(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    const int per_group = m.group / BLOCK;
    // two chains of sums where few rows would leave the multiplier waiting for its own result
    constexpr int chains = Count < 4 ? 2 : 1;
    for (int tile = first; tile < last; ++tile) {
        typename Isa::Floats total[Count];
        times<Count>([&](auto t) { total[t] = Isa::all(0); });
        for (int group = 0; group < m.groups(); ++group) {
            typename Isa::Sums sums[Count][chains];
            times<Count>([&](auto t) { times<chains>([&](auto c) { sums[t][c] = Isa::no_sums(); }); });
            const size_t at = size_t(group) * Count;
            const int8_t* q = x.q + at * x.group;
            const int end = std::min(m.blocks(), (group + 1) * per_group);
            for (int block = group * per_group; block < end; ++block, q += BLOCK) {
                const Place place = place_of<Width>(m, tile, block);
                times<8>([&](auto i) {
                    const auto words = vector_of<Isa, Width, i>(place);
                    times<Count>([&](auto t) {
                        auto& sum = sums[t][i % chains];
                        sum = Isa::template dot<Width>(sum, words, quad_at(q + t * x.group + 4 * i));
                    });
                });
            }
            const Grid<Isa> grid(m, tile, group);
            times<Count>([&](auto t) {
                const auto sum = chains == 2 ? Isa::add(sums[t][0], sums[t][chains - 1]) : sums[t][0];
                total[t] = grid.add(total[t], sum, x.scale[at + t], x.sum[at + t]);
            });
        }
        times<Count>([&](auto t) {
            store_rows<Isa>(m, tile, y + t * stride + size_t(tile - first) * TILE, total[t]);
        });
    }
}

constexpr int CHUNK = 128;  // rows whose sums stay in the nearest cache

// Sums of Count rows and Tiles tiles over one group of unpacked weights.
template <class Isa, int Width, int Tiles, int Count>
MOQA_INLINE void register_block(const uint8_t* weights, int quads, const int8_t* q, int group, const Grid<Isa>* grid,
                                const float* scale, const float* sum, float (*totals)[Tiles * TILE]) {
    // loops over these are unrolled by hand: one that the compiler keeps would keep the sums in memory
    typename Isa::Sums sums[Count][Tiles];
    times<Count>([&](auto t) { times<Tiles>([&](auto n) { sums[t][n] = Isa::no_sums(); }); });
    for (int i = 0; i < quads; ++i, weights += Tiles * VECTOR, q += 4) {
        typename Isa::Words words[Tiles];
        times<Tiles>([&](auto n) { words[n] = Isa::load(weights + n * VECTOR); });
        times<Count>([&](auto t) {
            const int32_t quad = quad_at(q + t * group);
            times<Tiles>([&](auto n) { sums[t][n] = Isa::template dot<Width>(sums[t][n], words[n], quad); });
        });
    }
    times<Count>([&](auto t) {
        times<Tiles>([&](auto n) {
            float* total = totals[t] + n * TILE;
            Isa::store(total, grid[n].add(Isa::load(total), sums[t][n], scale[t], sum[t]));
        });
    });
}

template <class Isa, int Width, int Tiles>
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
            for (int block = begin; block < end; ++block) {
                const Place place = place_of<Width>(m, tile + n, block);
                uint8_t* to = weights + size_t(block - begin) * block_bytes + n * VECTOR;
                times<8>([&](auto i) { Isa::store(to + i * Tiles * VECTOR, vector_of<Isa, Width, i>(place)); });
            }
        }
        const int quads = (end - begin) * 8;
        int t = 0;
        const auto block_of_rows = [&](auto rows) {
            const size_t at = size_t(group) * x.count + row + t;
            register_block<Isa, Width, Tiles, rows>(weights, quads, x.q + at * x.group, x.group, grids, x.scale + at,
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

template <class Isa, int Width>
void packed_product(const Matrix& m, const Rows& x, int first, int last, float* y, size_t stride) {
    if (x.count == 1) return one_row<Isa, Width>(m, x, first, last, y);
    if (x.count <= Isa::FEW) {
        times<Isa::FEW + 1>([&](auto count) {
            if constexpr (count > 1)
                if (count == x.count) few_rows<Isa, Width, count>(m, x, first, last, y, stride);
        });
        return;
    }
    for (int row = 0; row < x.count; row += CHUNK) {
        const int count = std::min(CHUNK, x.count - row);
        int tile = first;
        for (; tile + Isa::TILES <= last; tile += Isa::TILES)
            many_rows<Isa, Width, Isa::TILES>(m, x, row, count, tile, y + size_t(tile - first) * TILE, stride);
        for (; tile < last; ++tile)
            many_rows<Isa, Width, 1>(m, x, row, count, tile, y + size_t(tile - first) * TILE, stride);
    }
}

MOQA_INLINE float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

MOQA_INLINE int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

MOQA_INLINE float from_bfloat16(uint16_t bits) { return float_of(int32_t(uint32_t(bits) << 16)); }

// Lanes of partial sums, which the compiler keeps in vector registers.
constexpr int LANES = 32;

template <int Count>
void dense_rows(const Matrix& m, const Rows& x, int row, int first, int last, float* y, size_t stride) {
    const int whole = m.in / LANES * LANES;
    for (int r = first * TILE; r < std::min(last * TILE, m.out); ++r) {
        const uint16_t* w = m.dense + size_t(r) * m.in;
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
        if constexpr (width > 0)
            if (width == m.width) packed_product<Isa, width>(m, x, first, last, y, stride);
    });
}

inline void quantize(const Rows& x, int index) {
    const float* values = x.values[index];
    for (int group = 0; group < x.groups(); ++group) {
        const int begin = group * x.group, size = std::min(x.group, x.in - begin);
        const size_t at = size_t(group) * x.count + index;
        int8_t* q = x.q + at * x.group;
        // magnitudes compare as their bits do, and integers reduce in any order
        int32_t bits = 0;
        for (int i = 0; i < size; ++i) bits = std::max(bits, bits_of(values[begin + i]) & 0x7fffffff);
        std::memset(q, 0, x.group);
        if (bits >= 0x7f800000) {  // NaN or infinite: every output of the row must say so
            x.scale[at] = x.sum[at] = NAN;
            continue;
        }
        const float largest = float_of(bits), scale = largest / 127.0f;
        const float inverse = scale >= 1e-36f ? 1.0f / scale : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < size; ++i) {
            // adding 1.5 * 2^23 leaves the rounded integer in the low bits
            const int32_t n = bits_of(values[begin + i] * inverse + 12582912.0f) - bits_of(12582912.0f);
            q[i] = int8_t(n);
            sum += n;
        }
        x.scale[at] = scale;
        x.sum[at] = scale * float(sum);
    }
}

// e^x within 2e-7; compilers turn loops over it into vectors, which they do not for the library's.
MOQA_INLINE float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const float series = ((((1.98756915e-4f * f + 1.39819995e-3f) * f + 8.33345191e-3f) * f + 4.16657960e-2f) * f +
                          1.66666655e-1f) * f + 5.0e-1f;
    const float power = float_of((bits_of(shifted) - bits_of(12582912.0f) + 127) << 23);
    return (series * f * f + f + 1.0f) * power;
}

MOQA_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline void activate(Activation kind, float* gate, const float* up, int count) {
    switch (kind) {
        case Activation::silu:
            for (int i = 0; i < count; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
            break;
        case Activation::gelu:
            for (int i = 0; i < count; ++i) gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
            break;
        case Activation::gelu_tanh:  // (1 + tanh z) / 2 = sigmoid(2 z)
            for (int i = 0; i < count; ++i) {
                const float x = gate[i];
                gate[i] = x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)) * up[i];
            }
            break;
        case Activation::swiglu_clamped:  // gpt_oss
            for (int i = 0; i < count; ++i) {
                const float x = std::min(gate[i], 7.0f), u = std::min(std::max(up[i], -7.0f), 7.0f);
                gate[i] = (u + 1.0f) * x * sigmoid(1.702f * x);
            }
            break;
    }
}

MOQA_INLINE float dot_floats(const float* a, const float* b, int count) {
    float lanes[LANES] = {}, total = 0;
    const int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; ++l) lanes[l] += a[i + l] * b[i + l];
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    for (int i = whole; i < count; ++i) total += a[i] * b[i];
    return total + lanes[0];
}

inline void float_product(const float* weights, int rows, int in, const float* x, float* y) {
    for (int r = 0; r < rows; ++r) y[r] = dot_floats(weights + size_t(r) * in, x, in);
}

inline void attend(const float* q, int heads, const float* keys, const float* values, int length, int dim, float scale,
                   float* scores, float* y) {
    // keys and values are read once for all heads that share them
    for (int t = 0; t < length; ++t)
        for (int h = 0; h < heads; ++h)
            scores[size_t(h) * length + t] = scale * dot_floats(q + h * dim, keys + size_t(t) * dim, dim);
    for (int h = 0; h < heads; ++h) {
        float* row = scores + size_t(h) * length;
        const float largest = *std::max_element(row, row + length);
        float total = 0;
        for (int t = 0; t < length; ++t) row[t] = exponential(row[t] - largest);
        for (int t = 0; t < length; ++t) total += row[t];
        for (int t = 0; t < length; ++t) row[t] /= total;
    }
    std::memset(y, 0, sizeof(float) * heads * dim);
    for (int t = 0; t < length; ++t)
        for (int h = 0; h < heads; ++h) {
            const float weight = scores[size_t(h) * length + t];
            const float* value = values + size_t(t) * dim;
            for (int i = 0; i < dim; ++i) y[h * dim + i] += weight * value[i];
        }
}

inline uint64_t read(const uint8_t* data, size_t bytes) {
    constexpr size_t piece = 256;
    uint64_t lanes[piece / 8] = {}, words[piece / 8], total = 0;
    for (size_t at = 0; at + piece <= bytes; at += piece) {
        for (size_t line = 0; line < piece; line += VECTOR) __builtin_prefetch(data + at + line + AHEAD);
        std::memcpy(words, data + at, piece);
        for (size_t i = 0; i < piece / 8; ++i) lanes[i] ^= words[i];
    }
    for (uint64_t lane : lanes) total ^= lane;
    return total;
}

}  // namespace
}  // namespace moqa
