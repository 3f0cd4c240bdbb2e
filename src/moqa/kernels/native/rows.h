// Quantized rows with the memory that they live in.
#pragma once

#include "matrix.h"
#include "scratch.h"

namespace moqa {

struct QuantizedRows : Rows {
    Scratch bytes, scales, sums, rows;

    void shape(int new_count, int new_in, int new_group) {
        count = new_count, in = new_in, group = new_group;
        const size_t entries = size_t(groups()) * count;
        q = bytes.get<int8_t>(entries * group);
        scale = scales.get<float>(entries);
        sum = sums.get<float>(entries);
        values = rows.get<const float*>(count);
    }
};

}  // namespace moqa
