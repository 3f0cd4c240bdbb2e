#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "pool.h"
#include "scratch.h"

namespace moqa {
namespace {

void normalize(const Norm& norm, const float* x, float* y, int size) {
    if (norm.weight == nullptr) {
        if (x != y) std::memcpy(y, x, size * sizeof(float));
        return;
    }
    float sum = 0;
    float lanes[16] = {};
    const int whole = size / 16 * 16;
    for (int i = 0; i < whole; i += 16)
        for (int l = 0; l < 16; ++l) lanes[l] += x[i + l] * x[i + l];
    for (int i = whole; i < size; ++i) sum += x[i] * x[i];
    sum = std::accumulate(lanes, lanes + 16, sum);
    const float inverse = 1.0f / std::sqrt(sum / float(size) + norm.epsilon);
    for (int i = 0; i < size; ++i) y[i] = norm.weight[i] * (x[i] * inverse);
}

// Rotates pairs (i, i + rotated / 2) of every head.
void rotate(float* x, int heads, int head_dim, const float* cos, const float* sin, int rotated) {
    const int half = rotated / 2;
    for (int h = 0; h < heads; ++h, x += head_dim)
        for (int i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i + half] + a * sin[i + half];
        }
}

// Working memory of one token.
struct Work {
    Scratch memory[12];
    QuantizedRows rows;

    template <int Slot>
    float* floats(size_t count) {
        return memory[Slot].get<float>(count);
    }
};

void attend(const Path& path, const Attention& a, const float* x, int layer, const Past& past, int position,
            const float* cos, const float* sin, int rotated, float* y, Work& work, int threads) {
    const int queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim, length = position + 1;
    float* q = work.floats<0>(queries);
    float* k = work.floats<1>(keys);
    float* v = work.floats<2>(keys);
    products(path, {{a.q, a.q_bias, q}, {a.k, a.k_bias, k}, {a.v, a.v_bias, v}}, x, work.rows, threads);
    const auto norm_all = [&](const Norm& norm, float* values, int heads) {
        const int size = a.norm_heads ? a.head_dim : heads * a.head_dim;
        for (int i = 0; i < heads * a.head_dim; i += size) normalize(norm, values + i, values + i, size);
    };
    norm_all(a.q_norm, q, a.heads);
    norm_all(a.k_norm, k, a.kv_heads);
    rotate(q, a.heads, a.head_dim, cos, sin, rotated);
    rotate(k, a.kv_heads, a.head_dim, cos, sin, rotated);
    const size_t state = past.state(a.head_dim);
    const auto keep = [&](const float* found, char* to) {
        if (past.bytes) return path.to_bytes(found, a.head_dim, reinterpret_cast<int8_t*>(to));
        std::memcpy(to, found, state);
    };
    for (int h = 0; h < a.kv_heads; ++h) {
        const size_t at = (size_t(h) * past.capacity + position) * state;
        keep(k + h * a.head_dim, past.keys[layer] + at);
        keep(v + h * a.head_dim, past.values[layer] + at);
    }
    float* scores = work.floats<3>(size_t(a.heads) * length);
    float* mixed = work.floats<4>(queries);
    const int sharing = a.heads / a.kv_heads;
    // with a short past, this is done before another thread has woken up
    parallel(size_t(length) * keys * 8 < (1 << 18) ? 1 : threads, a.kv_heads, [&](int h) {
        const size_t at = size_t(h) * past.capacity * state;
        path.attend(q + size_t(h) * sharing * a.head_dim, sharing, past.keys[layer] + at, past.values[layer] + at,
                    past.bytes, length, a.head_dim, a.scale, scores + size_t(h) * sharing * length,
                    mixed + size_t(h) * sharing * a.head_dim);
    });
    products(path, {{a.o, a.o_bias, y}}, mixed, work.rows, threads);
}

// The experts of a token and their weights, the largest first.
void route(const Path& path, const Router& router, const float* x, int hidden, int64_t* index, float* weights,
           float* scores) {
    path.float_product(router.weight, router.experts, hidden, x, scores);
    const float largest = *std::max_element(scores, scores + router.experts);
    float total = 0;
    for (int e = 0; e < router.experts; ++e) total += scores[e] = std::exp(scores[e] - largest);
    float sum = 0;
    for (int k = 0; k < router.top_k; ++k) {
        const int best = int(std::max_element(scores, scores + router.experts) - scores);
        index[k] = best;
        sum += weights[k] = scores[best] / total;
        scores[best] = -1;
    }
    if (router.normalize)
        for (int k = 0; k < router.top_k; ++k) weights[k] /= sum;
}

void mlp(const Path& path, const Mlp& m, const float* x, int hidden, float* y, Work& work, int threads) {
    const int width = m.gate->out;
    float* gate = work.floats<5>(width);
    float* up = work.floats<6>(width);
    products(path, {{m.gate, nullptr, gate}, {m.up, nullptr, up}}, x, work.rows, threads);
    path.activate(m.activation, gate, up, width);
    products(path, {{m.down, nullptr, y}}, gate, work.rows, threads);
    if (m.share == nullptr) return;
    float share;
    path.float_product(m.share, 1, hidden, x, &share);
    share = 1.0f / (1.0f + std::exp(-share));
    for (int i = 0; i < hidden; ++i) y[i] *= share;
}

}  // namespace

void decode(const Path& path, const Decoder& decoder, const Past& past, const float* embedding, int position,
            const float* cos, const float* sin, int rotated, float* logits, int threads) {
    static thread_local Work kept;
    Work& work = kept;
    const int hidden = decoder.hidden;
    float* stream = work.floats<7>(hidden);
    float* x = work.floats<8>(hidden);
    float* y = work.floats<9>(hidden);
    std::memcpy(stream, embedding, hidden * sizeof(float));
    const auto add = [&] {
        for (int i = 0; i < hidden; ++i) stream[i] += y[i];
    };
    for (int layer = 0; layer < int(decoder.layers.size()); ++layer) {
        const Layer& l = decoder.layers[layer];
        normalize(l.before_attention, stream, x, hidden);
        attend(path, l.attention, x, layer, past, position, cos, sin, rotated, y, work, threads);
        add();
        normalize(l.before_mlp, stream, x, hidden);
        if (l.router.weight != nullptr) {
            float* scores = work.floats<10>(l.router.experts);
            std::vector<int64_t> index(l.router.top_k);
            std::vector<float> weights(l.router.top_k);
            route(path, l.router, x, hidden, index.data(), weights.data(), scores);
            if (l.router.counts != nullptr)
                for (const int64_t expert : index) ++l.router.counts[expert];
            experts(path, *l.experts, {x, false}, 1, l.router.top_k, index.data(), weights.data(), {y, false}, threads);
            add();
        }
        if (l.mlp.gate != nullptr) {
            mlp(path, l.mlp, x, hidden, y, work, threads);
            add();
        }
    }
    normalize(decoder.norm, stream, x, hidden);
    products(path, {{decoder.head, nullptr, logits}}, x, work.rows, threads);
}

}  // namespace moqa
