// Levels looked up by windows: the low six bits of a byte, among which the bits of a level's number may lie anywhere.
// So a field is neither moved to the end of its byte nor cut out of it, as it is in unpack.h; a table of 64 levels knows
// where its bits are, and gives the same level whatever the other bits are.
#pragma once

#include <array>

#include "unpack.h"

namespace moqa {
namespace {

// For each window the level whose number has its bits, the lowest first, at Positions.
template <Code code, int Width, int... Positions>
struct Levels {
    static constexpr std::array<uint8_t, 64> made() {
        constexpr int positions[] = {Positions...}, half = 1 << (sizeof...(Positions) - 1);
        constexpr const int8_t* upper = code == Code::trellis ? TRELLIS[Width] : TABLE[Width];
        std::array<uint8_t, 64> bytes{};
        for (int window = 0; window < 64; ++window) {
            int number = 0;
            for (size_t bit = 0; bit < sizeof...(Positions); ++bit) number |= (window >> positions[bit] & 1) << bit;
            bytes[window] = uint8_t(LEVEL_ZERO + level_at(upper, half, number));
        }
        return bytes;
    }
    alignas(64) static constexpr std::array<uint8_t, 64> bytes = made();
};

template <class Isa, Code code, int Width>
struct Unpacked<Isa, code, Width, true> : TilesBefore<Width> {
    using Words = typename Isa::Words;
    using TilesBefore<Width>::TilesBefore;

    template <int... Positions>
    static MOQA_INLINE Words level(Words windows) {
        return Isa::lookup_by_window(Isa::load(Levels<code, Width, Positions...>::bytes.data()), windows);
    }

    template <int I>
    MOQA_INLINE Words vector(const Place& place) const {
        if constexpr (Width == 3) {
            return of_three_bits<I>(place);
        } else {
            const Words plane = Isa::load(place.planes[0] + VECTOR * (I * Width / 8));
            return of_one_plane<I>(plane, std::make_integer_sequence<int, Width>());
        }
    }

    template <int I, int... Bits>
    static MOQA_INLINE Words of_one_plane(Words plane, std::integer_sequence<int, Bits...>) {
        constexpr int low = I * Width % 8, moved = low + Width > 6 ? 2 : 0;
        return level<(low - moved + Bits)...>(Isa::template shift<moved>(plane));
    }

    template <int I>
    static MOQA_INLINE Words of_three_bits(const Place& place) {
        constexpr int field = I % 4, first = I / 4 * 4;  // first: the bit of field 0 in the plane of low bits
        const Words high = Isa::load(place.planes[0] + VECTOR * (I / 4)), low = Isa::load(place.planes[1]);
        const Words moved = Isa::template shift<first + 1>(low);
        if constexpr (field == 0) {
            constexpr int left = first == 0 ? -2 : 0;
            return level<first - left, 0, 1>(Isa::select(0x03, high, Isa::template shift<left>(low)));
        } else if constexpr (field == 3) {
            return level<2, 4, 5>(Isa::select(0x30, Isa::template shift<2>(high), moved));
        } else {
            return level<field - 1, 2 * field, 2 * field + 1>(Isa::select(0x3C, high, moved));
        }
    }

    template <int I>
    MOQA_INLINE Words vector(const Place& place, Words now, Words newest, Words earlier) const {
        const Words parity = Isa::difference(now, Width == 2 ? Isa::mask(earlier, 0x55) : earlier);
        if constexpr (Width == 1) {
            if constexpr (I < 3) {
                return level<I + 3, I>(Isa::select(0x07, parity, Isa::template shift<-3>(newest)));
            } else if constexpr (I < 6) {
                return level<I - 3, I>(Isa::select(0x38, parity, Isa::template shift<3>(newest)));
            } else {
                const Words moved = Isa::template shift<6>(parity);
                return level<I - 4, I - 6>(Isa::select(0x03, moved, Isa::template shift<4>(newest)));
            }
        } else if constexpr (Width == 2) {
            // a field has the free bit and, below it, the parity
            constexpr int field = I % 4;
            const Words left = Isa::template shift<-2>(newest), right = Isa::template shift<2>(newest);
            if constexpr (field == 0) return level<2, 0, 1>(Isa::select(0x03, parity, left));
            if constexpr (field == 1) return level<4, 2, 3>(Isa::select(0x0C, parity, left));
            if constexpr (field == 2) return level<2, 4, 5>(Isa::select(0x30, parity, right));
            return level<4, 2, 3>(Isa::select(0x0C, Isa::template shift<4>(parity), right));
        } else {
            // newest bit and parity of every second field as pairs, which move to where no free bits are
            const Words pairs = I % 2 ? Isa::select(0xAA, parity, Isa::template shift<1>(newest))
                                      : Isa::select(0x55, newest, Isa::template shift<-1>(parity));
            constexpr int pair = I / 2 * 2, field = I % 4 * 2;
            constexpr int moved = I == 0 ? -2 : pair == 6 ? 4 : 0, low = field == 6 ? 2 : 0, at = field - low;
            const Words free = Isa::template shift<low>(Isa::load(place.planes[0] + VECTOR * (I / 4)));
            return level<pair - moved, pair - moved + 1, at, at + 1>(
                Isa::select(3 << at, free, Isa::template shift<moved>(pairs)));
        }
    }
};

}  // namespace
}  // namespace moqa
