// One token through all layers of a decoder in one call. With a single token, a framework's overhead between the
// products takes longer than the products.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace moqa {

// y = x / rms(x) * weight
struct Norm {
    const float* weight;  // null: no norm
    float epsilon;
};

struct Attention {
    const Matrix *q, *k, *v, *o;
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    Norm q_norm, k_norm;
    bool norm_heads;  // normalize each head separately, or all of them as one
    int heads, kv_heads, head_dim;
    float scale;
};

// gate, up and down of an MLP that every token passes; `share` computes a learned factor of its output, or is null.
struct Mlp {
    const Matrix *gate, *up, *down;
    const float* share;
    Activation activation;
};

// The `top_k` largest of softmax(weight x), divided by their sum if `normalize`.
struct Router {
    const float* weight;  // [experts, hidden]; null: no routed experts
    int experts, top_k;
    bool normalize;
    int64_t* counts = nullptr;  // [experts] tokens of each expert, incremented; null: not counted
};

struct Layer {
    Norm before_attention, before_mlp;
    Attention attention;
    Router router;
    const Experts* experts;
    Mlp mlp;  // gate null: none
};

struct Decoder {
    std::vector<Layer> layers;
    Norm norm;
    const Matrix* head;
    int hidden;
};

// Keys and values of the tokens so far, [kv_heads, capacity, head_dim] floats for each layer, or as many bytes with one
// float after those of each token (`Path::to_bytes`).
struct Past {
    std::vector<char*> keys, values;
    int capacity;
    bool bytes = false;

    // bytes of one token's keys of a head
    size_t state(int head_dim) const { return bytes ? head_dim + sizeof(float) : head_dim * sizeof(float); }
};

// Reads the embedding of the token at `position`, adds its keys and values to the past, and writes the [vocabulary]
// logits of the next token. `cos` and `sin` are [rotated] for this position: the first features of a head are rotated.
void decode(const Path& path, const Decoder& decoder, const Past& past, const float* embedding, int position,
            const float* cos, const float* sin, int rotated, float* logits, int threads);

}  // namespace moqa
