// Work on plain floats in loops that the compiler vectorizes with the path's instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "unpack.h"

namespace moqa {
namespace {

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

inline void quantize(const Rows& x, int index) {
    const float* values = x.values[index];
    for (int group = 0; group < x.groups(); ++group) {
        const int begin = group * x.group, size = std::min(x.group, x.in - begin);
        const size_t at = size_t(group) * x.count + index;
        int8_t* q = x.q + at * x.group;
        // magnitudes are ordered like their bit patterns, and integers can be reduced in any order
        int32_t bits = 0;
        for (int i = 0; i < size; ++i) bits = std::max(bits, bits_of(values[begin + i]) & 0x7fffffff);
        std::memset(q, 0, x.group);
        if (bits >= 0x7f800000) {  // NaN or infinity: all outputs of the row become NaN
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

// e^x within 2e-7; compilers vectorize loops over it, unlike the library's.
MOQA_INLINE float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const float series = ((((1.98756915e-4f * f + 1.39819995e-3f) * f + 8.33345191e-3f) * f + 4.16657960e-2f) * f +
                          1.66666655e-1f) * f + 5.0e-1f;
    const float power = float_of(int32_t(uint32_t(bits_of(shifted) - bits_of(12582912.0f) + 127) << 23));
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

MOQA_INLINE float dot_bytes(const float* a, const int8_t* b, int count) {
    float lanes[LANES] = {}, total = 0;
    const int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; ++l) lanes[l] += a[i + l] * float(b[i + l]);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    for (int i = whole; i < count; ++i) total += a[i] * float(b[i]);
    return total + lanes[0];
}

// Keys or values as they are.
struct FloatStates {
    const float* from;
    int dim;

    MOQA_INLINE float dot(const float* q, int t) const { return dot_floats(q, from + size_t(t) * dim, dim); }
    MOQA_INLINE void add(float weight, int t, float* y) const {
        const float* state = from + size_t(t) * dim;
        for (int i = 0; i < dim; ++i) y[i] += weight * state[i];
    }
};

// Keys or values as bytes, and after those of a token the value of one step.
struct ByteStates {
    const int8_t* from;
    int dim;

    MOQA_INLINE const int8_t* state(int t) const { return from + size_t(t) * (dim + sizeof(float)); }
    MOQA_INLINE float step(const int8_t* state) const {
        float step;
        std::memcpy(&step, state + dim, sizeof(float));
        return step;
    }
    MOQA_INLINE float dot(const float* q, int t) const { return step(state(t)) * dot_bytes(q, state(t), dim); }
    MOQA_INLINE void add(float weight, int t, float* y) const {
        const int8_t* bytes = state(t);
        const float each = weight * step(bytes);
        for (int i = 0; i < dim; ++i) y[i] += each * float(bytes[i]);
    }
};

// One state as `ByteStates` reads it.
inline void to_bytes(const float* x, int dim, int8_t* to) {
    int32_t bits = 0;
    for (int i = 0; i < dim; ++i) bits = std::max(bits, bits_of(x[i]) & 0x7fffffff);
    float step = float_of(bits) / 127.0f;
    const float inverse = step >= 1e-36f && bits < 0x7f800000 ? 1.0f / step : 0.0f;
    for (int i = 0; i < dim; ++i)
        to[i] = inverse == 0 ? 0 : int8_t(bits_of(x[i] * inverse + 12582912.0f) - bits_of(12582912.0f));
    if (bits >= 0x7f800000) step = NAN, to[0] = 1;  // whatever is computed from it is NaN
    std::memcpy(to + dim, &step, sizeof(float));
}

template <typename States>
MOQA_INLINE void attend_to(const float* q, int heads, States keys, States values, int length, float scale,
                           float* scores, float* y) {
    const int dim = keys.dim;
    // keys and values are read once for all heads that share them
    for (int t = 0; t < length; ++t)
        for (int h = 0; h < heads; ++h) scores[size_t(h) * length + t] = scale * keys.dot(q + h * dim, t);
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
        for (int h = 0; h < heads; ++h) values.add(scores[size_t(h) * length + t], t, y + h * dim);
}

inline void attend(const float* q, int heads, const void* keys, const void* values, bool bytes, int length, int dim,
                   float scale, float* scores, float* y) {
    if (bytes) {
        const ByteStates k{static_cast<const int8_t*>(keys), dim}, v{static_cast<const int8_t*>(values), dim};
        return attend_to(q, heads, k, v, length, scale, scores, y);
    }
    const FloatStates k{static_cast<const float*>(keys), dim}, v{static_cast<const float*>(values), dim};
    attend_to(q, heads, k, v, length, scale, scores, y);
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
