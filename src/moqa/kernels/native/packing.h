// Integers into planes, see moqa/format/planes.py.
#pragma once

#include <algorithm>
#include <cstring>

#include "solve.h"
#include "matrix.h"

namespace moqa {
namespace {

inline void pack(const Packing& p, int tile) {
    const int first = tile * TILE, rows = std::min(TILE, p.rows - first);
    // a vector as numbers of four bytes, one for each row
    alignas(64) uint32_t vectors[8][TILE] = {}, plane[TILE];
    for (int block = 0; block < p.blocks(); ++block) {
        const int begin = block * BLOCK, size = std::min(BLOCK, p.in - begin);
        if (size < BLOCK) std::memset(vectors, 0, sizeof(vectors));
        for (int r = 0; r < rows; ++r) {
            const uint8_t* from = p.integers + size_t(first + r) * p.in + begin;
            for (int j = 0; j < size / 4; ++j) std::memcpy(&vectors[j][r], from + 4 * j, 4);
            if (size % 4) std::memcpy(&vectors[size / 4][r], from + size / 4 * 4, size % 4);
        }
        int low = p.width;
        for (int n = 0; n < plane_count(p.width); ++n) {
            const int bits = PLANES[p.width][n], fields = 8 / bits;
            const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
            low -= bits;
            uint8_t* to = p.planes[n] + (size_t(tile) * p.blocks() + block) * VECTOR * bits;
            for (int j = 0; j < bits; ++j, to += VECTOR) {
                std::memset(plane, 0, sizeof(plane));
                for (int k = 0; k < fields; ++k)
                    for (int r = 0; r < TILE; ++r) plane[r] |= (vectors[fields * j + k][r] >> low & mask) << (bits * k);
                std::memcpy(to, plane, VECTOR);
            }
        }
    }
}

}  // namespace
}  // namespace moqa
