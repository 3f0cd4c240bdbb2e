// The two entry points: a linear layer, and all routed experts of a layer.
#pragma once

#include <initializer_list>
#include <vector>

#include "patch.h"

namespace moqa {

// Activations of the caller: [rows, features], contiguous.
struct Array {
    void* data;
    bool bfloat16;  // or float32
};

// y[rows, out] = x[rows, in] times the matrix, plus bias[out] if given.
void linear(const Path& path, const Matrix& matrix, Array x, int rows, const float* bias, Array y, int threads);

// y[out] = matrix times x, plus bias[out] if given; several matrices for one row x[in], in one call.
struct Product {
    const Matrix* matrix;
    const float* bias;
    float* y;
};
void products(const Path& path, std::initializer_list<Product> list, const float* x, QuantizedRows& rows,
              int threads);

// Matrices of a layer's experts. A bias is [experts, out] float32, or null.
struct Experts {
    std::vector<const Matrix*> gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;
    Activation activation;
    std::vector<const Patch*> patches;
};

// y[t] = sum over k of weights[t, k] * expert index[t, k] of x[t]. An index past the last expert stands for none.
void experts(const Path& path, const Experts& experts, Array x, int tokens, int top_k, const int64_t* index,
             const float* weights, Array y, int threads);

// Reads every byte as fast as this machine can: the reference for products that are limited by memory.
uint64_t read(const Path& path, const void* data, size_t bytes, int threads);

}  // namespace moqa
