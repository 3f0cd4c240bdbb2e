// The two loops of quantization over a stack of matrices of one shape.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moqa {

struct Path;

constexpr int ROUND_ROWS = 64;  // rows of a piece of work of `round`

// Grids with the least weighted squared error for [matrices, rows, in] weights.
struct Fitting {
    int matrices, rows, in, group;
    bool symmetric, half;      // half: scales are float16, not bfloat16
    bool bfloat16;             // weights are, not float32
    const void* weights;       // [matrices, rows, in]
    const uint8_t* width;      // [matrices, rows]
    const float* importance;   // [matrices, in], or null: all count the same
    uint16_t* scale;           // [matrices, rows, groups]; of planes [tiles, groups, 16]
    uint8_t* zero;             // likewise, or null if symmetric
    float* error;              // [matrices, rows, groups] that squared error
    uint8_t* integers;         // [matrices, rows, in]
    uint8_t* planes[3];        // of a single matrix of one width, in place of errors and integers; or null

    int groups() const { return (in + group - 1) / group; }
};

// One block of GPTQ's columns, from the last in its order to the first. Weight = scale * (integer - offset).
// On a grid, or as codes of one or more matrices that are stacked along the rows.
struct Rounding {
    int matrices, rows, in, group, groups, first, columns;
    const float* values;   // [matrices, columns, rows] current weights of the block
    float* work;           // [matrices, in, rows] weights, which become weight minus stored weight
    const float* factor;   // [matrices, in, in] L: column k gets L[j][k] / L[k][k] of the error of a later column j;
                           // null for codes whose errors are not passed on
    const int64_t* order;  // [matrices, in] columns of the matrix
    const float* scale;    // [matrices, groups, rows]
    const float* offset;   // [matrices, groups, rows]; null for codes
    const float* top;      // [matrices, rows] the largest integer; null for codes
    uint8_t* integers;     // [matrices, in, rows], columns as in the matrix
    bool trellis;          // codes are a trellis, not a table
    int apart;             // rows from one to the next in a sequence of the trellis
    int parts;             // 0 on a grid
    const int* begin;      // [parts + 1] first row of each part
    const uint8_t* width;  // [matrices, parts]
};

// Planes of [rows, in] integers of `width` bits, see moqa/format/planes.py.
struct Packing {
    int rows, in, width;
    const uint8_t* integers;
    uint8_t* planes[3];

    int blocks() const { return (in + 31) / 32; }
};

void fit(const Path& path, const Fitting& fitting, int threads);
void round(const Path& path, const Rounding& rounding, int threads);
void pack(const Path& path, const Packing& packing, int threads);

}  // namespace moqa
