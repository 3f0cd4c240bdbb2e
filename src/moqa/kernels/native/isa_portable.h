// Vectors as plain arrays, for any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace moqa {

struct Portable {
    struct Words {
        uint8_t v[64];
    };
    struct Sums {
        int32_t v[16];
    };
    struct Floats {
        float v[16];
    };
    static constexpr bool PLANE_BY_PLANE = false;
    static constexpr bool WINDOWS = false;
    static constexpr int FEW = 1;
    static constexpr int STRIP = 1;
    static constexpr int TILES = 1;
    static constexpr int TOKENS = 2;

    static Words load(const uint8_t* p) {
        Words x;
        std::memcpy(x.v, p, 64);
        return x;
    }
    static void store(uint8_t* p, Words x) { std::memcpy(p, x.v, 64); }
    template <int S>
    static Words shift(Words x) {
        for (uint8_t& byte : x.v) byte = S >= 0 ? uint8_t(byte >> (S & 7)) : uint8_t(byte << (-S & 7));
        return x;
    }
    static Words mask(Words x, uint8_t m) {
        for (uint8_t& byte : x.v) byte &= m;
        return x;
    }
    static Words merge(Words total, Words x, uint8_t m) {
        for (int i = 0; i < 64; ++i) total.v[i] |= x.v[i] & m;
        return total;
    }
    static Words difference(Words a, Words b) {
        for (int i = 0; i < 64; ++i) a.v[i] ^= b.v[i];
        return a;
    }
    static Words repeated(const uint8_t* p) {
        Words x;
        for (int i = 0; i < 64; ++i) x.v[i] = p[i % 16];
        return x;
    }
    static Words lookup(Words table, Words numbers) {
        for (uint8_t& number : numbers.v) number = table.v[number];
        return numbers;
    }
    static Sums no_sums() { return Sums{}; }
    static Sums add(Sums a, Sums b) {
        for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
        return a;
    }
    template <int Width>
    static Sums dot(Sums sums, Words w, int32_t quad) {
        int8_t x[4];
        std::memcpy(x, &quad, 4);
        for (int i = 0; i < 16; ++i)
            sums.v[i] += w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
        return sums;
    }
    template <int S>
    static Sums divide(Sums x) {
        for (int32_t& value : x.v) value /= 1 << S;
        return x;
    }
    template <int S>
    static Sums multiply_by(Sums x) {
        for (int32_t& value : x.v) value *= 1 << S;
        return x;
    }
    static Floats to_float(Sums x) {
        Floats y;
        for (int i = 0; i < 16; ++i) y.v[i] = float(x.v[i]);
        return y;
    }
    static Floats all(float x) {
        Floats y;
        for (float& value : y.v) value = x;
        return y;
    }
    static Floats load(const float* p) {
        Floats x;
        std::memcpy(x.v, p, 64);
        return x;
    }
    static void store(float* p, Floats x) { std::memcpy(p, x.v, 64); }
    static Floats multiply(Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
        return a;
    }
    static Floats add_product(Floats c, Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static Floats subtract_product(Floats c, Floats a, Floats b) {
        for (int i = 0; i < 16; ++i) c.v[i] -= a.v[i] * b.v[i];
        return c;
    }
    static Floats scales(const uint16_t* p, bool half) {
        Floats y;
        for (int i = 0; i < 16; ++i) y.v[i] = half ? from_half(p[i]) : from_bits(uint32_t(p[i]) << 16);
        return y;
    }
    static Floats bytes(const uint8_t* p) {
        Floats y;
        for (int i = 0; i < 16; ++i) y.v[i] = float(p[i]);
        return y;
    }
    static Floats factors(const uint8_t* p) {
        Floats y;
        for (int i = 0; i < 16; ++i)
            y.v[i] = float((p[i % 8] >> i / 8 * 4 & 15) | (p[8 + i % 4] >> i / 4 * 2 & 3) << 4);
        return y;
    }

    static float from_bits(uint32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    static float from_half(uint16_t half) {
        // a half's exponent and fraction, read as a float, are its value times 2^-112, subnormals included
        const float magnitude = from_bits(uint32_t(half & 0x7fff) << 13) * from_bits(uint32_t(127 + 112) << 23);
        return half & 0x8000 ? -magnitude : magnitude;
    }
};

}  // namespace moqa
