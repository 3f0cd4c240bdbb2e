#include "codes.h"
#include "columns.h"
#include "grid.h"
#include "isa_avx512.h"
#include "packing.h"
#include "product.h"

namespace moqa {

const Path avx512_path = {
    "avx512",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    },
    quantize,
    product<Avx512>,
    activate,
    float_product,
    attend,
    to_bytes,
    read,
    fit,
    round,
    round_codes,
    WIDE,
    pack,
};

}  // namespace moqa
