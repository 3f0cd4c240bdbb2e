// A packed matrix and quantized rows, which all paths compute with. Layout: docs/format.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moqa {

constexpr int TILE = 16;    // rows of a tile
constexpr int BLOCK = 32;   // inputs of a tile
constexpr int VECTOR = 64;  // bytes of a vector: four inputs of each row of a tile

// Bits of each plane by width, the most significant first.
constexpr int PLANES[9][3] = {{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {2, 1, 0}, {4, 0, 0},
                              {4, 1, 0}, {4, 2, 0}, {4, 2, 1}, {4, 4, 0}};

// What the planes hold: integers on a grid, the numbers of levels, or codes of a trellis (moqa/format/levels.py).
enum class Code : uint8_t { integers, table, trellis };

// Added to levels, which are then bytes without a sign.
constexpr int LEVEL_ZERO = 64;
constexpr int FACTOR_BYTES = 12;  // of the 16 rows of a tile, six bits each

struct Matrix {
    int out, in, width, group;  // width 16: `dense` holds [out, in] bfloat16
    const uint8_t* planes[3];
    const uint16_t* scale;  // [tiles, groups, 16]; of codes [tiles, 16]
    const uint8_t* zero;    // [tiles, groups, 16]; null if symmetric; of codes the factors, [tiles, groups, 12]
    bool half;              // scales are float16, not bfloat16
    const uint16_t* dense;
    int stride;  // from a tile to the next in blocks, or from a row of `dense` to the next in inputs
    Code code;

    int tiles() const { return (out + TILE - 1) / TILE; }
    int blocks() const { return (in + BLOCK - 1) / BLOCK; }
    int groups() const { return (in + group - 1) / group; }
    // The position of weight zero is `zero * zero_step()`, or the middle of the grid if symmetric.
    float zero_step() const { return float((1 << width) - 1) / 255.0f; }
    float middle() const { return float(1 << (width - 1)); }
    size_t row_bytes() const { return width == 16 ? size_t(in) * 2 : size_t(in) * width / 8; }
};

// Rows of activations, quantized group by group: value = scale * q with q in -127..127.
struct Rows {
    int count, in, group;
    int8_t* q;      // [groups, count, group], zero beyond `in`
    float* scale;   // [groups, count]
    float* sum;     // [groups, count]: scale * (sum of q), which is multiplied with zero-points
    const float** values;  // [count] rows of `in` floats, for dense matrices

    int groups() const { return (in + group - 1) / group; }
};

}  // namespace moqa
