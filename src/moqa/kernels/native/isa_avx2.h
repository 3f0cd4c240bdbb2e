// Vectors of AVX2: 64 bytes in two registers, a product of bytes in three instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace moqa {

struct Avx2 {
    struct Words {
        __m256i a, b;
    };
    using Sums = Words;
    struct Floats {
        __m256 a, b;
    };
    static constexpr bool PLANE_BY_PLANE = false;
    static constexpr bool WINDOWS = false;
    static constexpr int FEW = 2;
    static constexpr int STRIP = 1;
    static constexpr int TILES = 1;
    static constexpr int TOKENS = 4;

    static __m256i half_of(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Words load(const uint8_t* p) { return {half_of(p), half_of(p + 32)}; }
    static void store(uint8_t* p, Words x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
    }
    template <int S>
    static Words shift(Words x) {
        if constexpr (S > 0) return {_mm256_srli_epi16(x.a, S), _mm256_srli_epi16(x.b, S)};
        if constexpr (S < 0) return {_mm256_slli_epi16(x.a, -S), _mm256_slli_epi16(x.b, -S)};
        return x;
    }
    static Words mask(Words x, uint8_t m) {
        const __m256i all = _mm256_set1_epi8(char(m));
        return {_mm256_and_si256(x.a, all), _mm256_and_si256(x.b, all)};
    }
    static Words merge(Words total, Words x, uint8_t m) {
        const Words part = mask(x, m);
        return {_mm256_or_si256(total.a, part.a), _mm256_or_si256(total.b, part.b)};
    }
    static Words difference(Words a, Words b) { return {_mm256_xor_si256(a.a, b.a), _mm256_xor_si256(a.b, b.b)}; }
    static Words repeated(const uint8_t* p) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
        return {both, both};
    }
    static Words lookup(Words table, Words numbers) {
        return {_mm256_shuffle_epi8(table.a, numbers.a), _mm256_shuffle_epi8(table.b, numbers.b)};
    }
    static Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Sums add(Sums a, Sums b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
    template <int Width>
    static __m256i dot(__m256i sums, __m256i w, __m256i x) {
        if constexpr (Width < 8) {
            return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
        } else {
            // two products of 8 bits do not fit in the 16 bits in which pairs are summed: nibbles separately
            const __m256i nibble = _mm256_set1_epi8(15);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), low = _mm256_and_si256(w, nibble);
            const __m256i sixteens = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(16));
            const __m256i ones = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), _mm256_set1_epi16(1));
            return _mm256_add_epi32(sums, _mm256_add_epi32(sixteens, ones));
        }
    }
    template <int Width>
    static Sums dot(Sums sums, Words w, int32_t quad) {
        const __m256i x = _mm256_set1_epi32(quad);
        return {dot<Width>(sums.a, w.a, x), dot<Width>(sums.b, w.b, x)};
    }
    template <int S>
    static Sums divide(Sums x) {
        return {_mm256_srai_epi32(x.a, S), _mm256_srai_epi32(x.b, S)};
    }
    template <int S>
    static Sums multiply_by(Sums x) {
        return {_mm256_slli_epi32(x.a, S), _mm256_slli_epi32(x.b, S)};
    }
    static Floats to_float(Sums x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, Floats x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static Floats add_product(Floats c, Floats a, Floats b) {
        return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
    }
    static Floats subtract_product(Floats c, Floats a, Floats b) {
        return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)};
    }
    static __m256 eight_scales(const uint16_t* p, bool half) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if (half) return _mm256_cvtph_ps(raw);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
    static Floats scales(const uint16_t* p, bool half) { return {eight_scales(p, half), eight_scales(p + 8, half)}; }
    static __m256 eight_bytes(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static Floats bytes(const uint8_t* p) { return {eight_bytes(p), eight_bytes(p + 8)}; }
    static Floats factors(const uint8_t* p) {
        const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        int32_t top;
        std::memcpy(&top, p + 8, 4);
        const __m256i high = _mm256_cvtepu8_epi32(_mm_set1_epi32(top));
        const __m256i first = _mm256_srlv_epi32(high, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0));
        const __m256i second = _mm256_srlv_epi32(high, _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4));
        const auto joined = [](__m256i four, __m256i two) {
            const __m256i sixteens = _mm256_slli_epi32(_mm256_and_si256(two, _mm256_set1_epi32(3)), 4);
            return _mm256_cvtepi32_ps(_mm256_or_si256(four, sixteens));
        };
        return {joined(_mm256_and_si256(low, _mm256_set1_epi32(15)), first), joined(_mm256_srli_epi32(low, 4), second)};
    }
};

}  // namespace moqa
