// Quantized rows with their memory.
#pragma once

#include <vector>

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

// Quantized rows in parts that share memory: if each part had its own, each would keep the most that it needed in any
// call.
struct QuantizedParts {
    std::vector<Rows> parts;
    Scratch bytes, scales, sums, rows;

    // Gives memory to parts that have a count, inputs and a group.
    void place() {
        size_t size = 0, entries = 0, count = 0;
        for (const Rows& part : parts) {
            size += size_t(part.groups()) * part.count * part.group;
            entries += size_t(part.groups()) * part.count;
            count += part.count;
        }
        int8_t* q = bytes.get<int8_t>(size);
        float *scale = scales.get<float>(entries), *sum = sums.get<float>(entries);
        const float** values = rows.get<const float*>(count);
        for (Rows& part : parts) {
            const size_t mine = size_t(part.groups()) * part.count;
            part.q = q, part.scale = scale, part.sum = sum, part.values = values;
            q += mine * part.group, scale += mine, sum += mine, values += part.count;
        }
    }
};

}  // namespace moqa
