#include "codes.h"
#include "columns.h"
#include "grid.h"
#include "isa_avx2.h"
#include "packing.h"
#include "product.h"

namespace moqa {

const Path avx2_path = {
    "avx2",
    [] {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    },
    quantize,
    product<Avx2>,
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
