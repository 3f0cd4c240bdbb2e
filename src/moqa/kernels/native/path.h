// One way to compute on a processor. Each path is compiled with its own instruction set; one is chosen at run time.
#pragma once

#include <vector>

#include "matrix.h"
#include "solve.h"

namespace moqa {

enum class Activation { silu, gelu, gelu_tanh, swiglu_clamped };

struct Path {
    const char* name;
    bool (*supported)();
    // Quantizes row `index` of `rows` from rows.values[index].
    void (*quantize)(const Rows& rows, int index);
    // y[t * stride + r - 16 * first] = row r of the matrix times row t, for the rows r of tiles first..last.
    void (*product)(const Matrix& matrix, const Rows& rows, int first, int last, float* y, size_t stride);
    // gate[i] = activation(gate[i]) * up[i]
    void (*activate)(Activation kind, float* gate, const float* up, int count);
    // y[r] = row r of weights[rows, in] times x[in]
    void (*float_product)(const float* weights, int rows, int in, const float* x, float* y);
    // Attention of `heads` queries [heads, dim] to keys and values [length, dim], floats, or bytes as `to_bytes` makes
    // them; scores is [heads, length] of memory.
    void (*attend)(const float* q, int heads, const void* keys, const void* values, bool bytes, int length, int dim,
                   float scale, float* scores, float* y);
    // x[dim] as dim bytes and one float, the value of a step.
    void (*to_bytes)(const float* x, int dim, int8_t* to);
    // Reads every byte and returns the XOR of the words.
    uint64_t (*read)(const uint8_t* data, size_t bytes);
    // See solve.h: a tile of rows of one matrix, and `ROUND_ROWS` of them.
    void (*fit)(const Fitting& fitting, int matrix, int tile);
    void (*round)(const Rounding& rounding, int matrix, int item);
    // Rows lane .. lane + lanes of every tile of a part.
    void (*round_codes)(const Rounding& rounding, int matrix, int part, int lane);
    int lanes;
    void (*pack)(const Packing& packing, int tile);
};

extern const Path avx512vbmi_path, avx512_path, avx2_path, portable_path;

// The paths that this processor runs, the fastest first.
std::vector<const Path*> supported_paths();

}  // namespace moqa
