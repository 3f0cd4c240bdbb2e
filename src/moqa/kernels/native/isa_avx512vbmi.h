// Vectors of AVX-512 with VNNI and VBMI, which looks up a byte among 64 by six bits of another, in one instruction.
#pragma once

#include "isa_avx512.h"

namespace moqa {
namespace {

struct Avx512Vbmi : Avx512 {
    static constexpr bool WINDOWS = true;

    // The bytes of `table` that the low six bits of each byte name; the other two bits do not matter.
    static Words lookup_by_window(Words table, Words windows) { return _mm512_permutexvar_epi8(windows, table); }
    // The bits of `x` that are in m, the others of `y`.
    static Words select(uint8_t m, Words x, Words y) {
        return _mm512_ternarylogic_epi64(_mm512_set1_epi8(char(m)), x, y, 0xCA);
    }
};

}  // namespace
}  // namespace moqa
