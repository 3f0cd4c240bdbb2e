#include "patch.h"

#include <algorithm>

namespace moqa {
namespace {

void quantize_all(const Path& path, const Matrix& m, const Rows& rows) {
    if (m.width != 16)
        for (int t = 0; t < rows.count; ++t) path.quantize(rows, t);
}

// Inputs begin ... begin + count - 1 of a matrix with a single group; whole blocks of a packed matrix.
Matrix inputs_of(const Matrix& m, int begin, int count) {
    Matrix part = m;
    if (m.width == 16) {
        part.in = count;
        part.dense += begin;
        return part;
    }
    const int first = begin / BLOCK, last = (begin + count + BLOCK - 1) / BLOCK;
    part.in = part.group = (last - first) * BLOCK;
    for (int n = 0; n < 3; ++n)
        if (PLANES[m.width][n] > 0) part.planes[n] += size_t(first) * VECTOR * PLANES[m.width][n];
    return part;
}

}  // namespace

void PatchedShare::multiply(const Path& path, const Channels& channels, const float* const* x, Products& products) {
    const int count = channels.count(expert_), begin = count == 0 ? 0 : channels.begin[expert_];
    if (count == 0) return;
    const Matrix& m = *channels.matrix;
    products.inputs.shape(tokens_, m.in, m.group);
    std::copy(x, x + tokens_, products.inputs.values);
    quantize_all(path, m, products.inputs);
    const int first = begin / TILE, last = (begin + count + TILE - 1) / TILE;
    products.stride = (last - first) * TILE;
    float* values = products.memory.get<float>(size_t(tokens_) * products.stride);
    path.product(m, products.inputs, first, last, values, products.stride);
    products.values = values + begin - first * TILE;
}

void PatchedShare::first(const Path& path, const Patch& patch, int expert, int tokens, const float* const* x) {
    patch_ = &patch, expert_ = expert, tokens_ = tokens;
    multiply(path, patch.gate, x, gates_);
    multiply(path, patch.up, x, ups_);
}

void PatchedShare::join(const Channels& channels, const Products& products, int token, int begin, int width,
                        float* y) const {
    const int count = channels.count(expert_);
    if (count == 0) return;
    const int* all = channels.channel.data() + channels.begin[expert_];
    const float* values = products.values + size_t(token) * products.stride;
    for (const int* c = std::lower_bound(all, all + count, begin); c < all + count && *c < begin + width; ++c)
        y[*c - begin] = (patch_->replaces ? 0.0f : y[*c - begin]) + values[c - all];
}

void PatchedShare::join(int token, int begin, int width, float* gate, float* up) const {
    join(patch_->gate, gates_, token, begin, width, gate);
    join(patch_->up, ups_, token, begin, width, up);
}

void PatchedShare::choose(const Path& path, float* activations, int inner) {
    const Channels& channels = patch_->down;
    const int count = channels.count(expert_);
    if (count == 0) return;
    const int begin = channels.begin[expert_];
    down_ = inputs_of(*channels.matrix, begin, count);
    const size_t length = size_t(tokens_) * down_.in;
    float* values = chosen_memory_.get<float>(length);
    std::fill(values, values + length, 0.0f);
    chosen_.shape(tokens_, down_.in, down_.group);
    const int offset = down_.width == 16 ? 0 : begin % BLOCK;
    for (int t = 0; t < tokens_; ++t) {
        float* row = values + size_t(t) * down_.in;
        for (int k = 0; k < count; ++k) {
            float& activation = activations[size_t(t) * inner + channels.channel[begin + k]];
            row[offset + k] = activation * channels.scale[begin + k];
            if (patch_->replaces) activation = 0.0f;
        }
        chosen_.values[t] = row;
    }
    quantize_all(path, down_, chosen_);
}

void PatchedShare::second(const Path& path, int first, int last, float* y, size_t stride) const {
    if (patch_->down.count(expert_) == 0) return;
    static thread_local Scratch memory;
    const int width = std::min(down_.out, last * TILE) - first * TILE;
    float* results = memory.get<float>(size_t(tokens_) * width);
    path.product(down_, chosen_, first, last, results, width);
    for (int t = 0; t < tokens_; ++t)
        for (int i = 0; i < width; ++i) y[t * stride + i] += results[size_t(t) * width + i];
}

}  // namespace moqa
