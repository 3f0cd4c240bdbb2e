// Vectors of AVX-512 with VNNI: 64 bytes in one register, a product of bytes in one instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace moqa {
// two paths include this, each compiled with its own instructions: the linker must not mix them
namespace {

struct Avx512 {
    using Words = __m512i;
    using Sums = __m512i;
    using Floats = __m512;
    static constexpr bool PLANE_BY_PLANE = true;  // whether a single row is multiplied so
    static constexpr bool WINDOWS = false;        // whether levels are looked up in windows (windows.h)
    static constexpr int FEW = 4;    // rows that the few-rows kernel takes at once
    static constexpr int STRIP = 4;  // tiles of a trellis that it takes at once with a single row
    static constexpr int TILES = 4;  // tiles and rows of the register block of the many-rows kernel
    static constexpr int TOKENS = 6;

    static Words load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store(uint8_t* p, Words x) { _mm512_storeu_si512(p, x); }
    // Shifts right by S bits, left if S is negative; bits that cross a byte are masked by the caller.
    template <int S>
    static Words shift(Words x) {
        if constexpr (S > 0) return _mm512_srli_epi16(x, S);
        if constexpr (S < 0) return _mm512_slli_epi16(x, -S);
        return x;
    }
    static Words mask(Words x, uint8_t m) { return _mm512_and_si512(x, _mm512_set1_epi8(char(m))); }
    // total | (x & m)
    static Words merge(Words total, Words x, uint8_t m) {
        return _mm512_ternarylogic_epi64(total, x, _mm512_set1_epi8(char(m)), 0xF8);
    }
    static Words difference(Words a, Words b) { return _mm512_xor_si512(a, b); }
    // Sixteen bytes, repeated, and the bytes of them that numbers below 16 name.
    static Words repeated(const uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Words lookup(Words table, Words numbers) { return _mm512_shuffle_epi8(table, numbers); }
    static Sums no_sums() { return _mm512_setzero_si512(); }
    static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    template <int Width>
    static Sums dot(Sums sums, Words w, int32_t quad) {
        // in assembly, since gcc copies each sum to another register before the intrinsic and back after it
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(_mm512_set1_epi32(quad)));
        return sums;
    }
    // x / 2^S for multiples of it, and x * 2^S
    template <int S>
    static Sums divide(Sums x) {
        return _mm512_srai_epi32(x, S);
    }
    template <int S>
    static Sums multiply_by(Sums x) {
        return _mm512_slli_epi32(x, S);
    }
    static Floats to_float(Sums x) { return _mm512_cvtepi32_ps(x); }
    static Floats all(float x) { return _mm512_set1_ps(x); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats add_product(Floats c, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, c); }
    static Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
    static Floats scales(const uint16_t* p, bool half) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if (half) return _mm512_cvtph_ps(raw);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    static Floats bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // Six bits for each row: eight bytes with two low fours, then four bytes with four high twos.
    static Floats factors(const uint8_t* p) {
        const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        int32_t top;
        std::memcpy(&top, p + 8, 4);
        const __m128i fours = _mm_and_si128(_mm_unpacklo_epi64(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
        const __m512i shifts = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
        const __m512i twos = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_set1_epi32(top)), shifts);
        const __m512i high = _mm512_slli_epi32(_mm512_and_si512(twos, _mm512_set1_epi32(3)), 4);
        return _mm512_cvtepi32_ps(_mm512_or_si512(_mm512_cvtepu8_epi32(fours), high));
    }
};

}  // namespace
}  // namespace moqa
