// Packs integers into planes, see moqa/format/planes.py.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "matrix.h"

namespace moqa {
namespace {

constexpr int FOURS = BLOCK / 4;  // vectors of a block, with four inputs of a row in each lane

// A block of rows `row`, `row` + 1, ... of a tile, with zeros in lanes without a row.
MOQA_INLINE void put_block(const Bits* fours, int width, size_t block, int row, uint8_t* const* planes) {
    int low = width;
    for (int n = 0; n < plane_count(width); ++n) {
        const int bits = PLANES[width][n], fields = 8 / bits;
        const int32_t mask = 0x01010101 * ((1 << bits) - 1);
        low -= bits;
        uint8_t* to = planes[n] + block * VECTOR * bits + 4 * row;
        for (int j = 0; j < bits; ++j, to += VECTOR) {
            Bits plane{};
            for (int k = 0; k < fields; ++k) plane |= (fours[fields * j + k] >> low & mask) << (bits * k);
            std::memcpy(to, &plane, sizeof(plane));
        }
    }
}

inline void pack(const Packing& p, int tile) {
    for (int row = 0; row < TILE; row += WIDE) {
        const int first = tile * TILE + row, rows = std::clamp(p.rows - first, 0, WIDE);
        for (int block = 0; block < p.blocks(); ++block) {
            const int begin = block * BLOCK, size = std::min(BLOCK, p.in - begin);
            const uint8_t* from = p.integers + size_t(first) * p.in + begin;
            Lanes whole[FOURS];
            gather(from, p.in, rows, size / 4, whole);
            Bits fours[FOURS] = {};
            for (int j = 0; j < size / 4; ++j) fours[j] = (Bits)whole[j];
            for (int l = 0; l < rows && size % 4; ++l) {
                int32_t some = 0;
                std::memcpy(&some, from + l * p.in + size / 4 * 4, size % 4);
                fours[size / 4][l] = some;
            }
            put_block(fours, p.width, size_t(tile) * p.blocks() + block, row, p.planes);
        }
    }
}

}  // namespace
}  // namespace moqa
