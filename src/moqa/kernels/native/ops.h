// The two entry points: a linear layer, and all routed experts of a layer.
#pragma once

#include <optional>
#include <vector>

#include "path.h"

namespace moqa {

// Activations as the caller has them: [rows, features], rows one after the other.
struct Array {
    void* data;
    bool bfloat16;  // or float32
};

// y[rows, out] = x[rows, in] times the matrix, plus bias[out] if given.
void linear(const Path& path, const Matrix& matrix, Array x, int rows, const float* bias, Array y, int threads);

// Matrices of a layer's experts. A bias is [experts, out] float32, or null.
struct Experts {
    std::vector<const Matrix*> gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;
    Activation activation;
};

// y[t] = sum over k of weights[t, k] * expert index[t, k] of x[t]. An index past the last expert means none.
void experts(const Path& path, const Experts& experts, Array x, int tokens, int top_k, const int64_t* index,
             const float* weights, Array y, int threads);

}  // namespace moqa
