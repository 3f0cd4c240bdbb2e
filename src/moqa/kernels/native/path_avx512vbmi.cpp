#include "codes.h"
#include "columns.h"
#include "grid.h"
#include "isa_avx512vbmi.h"
#include "packing.h"
#include "product.h"

namespace moqa {

const Path avx512vbmi_path = {
    "avx512vbmi",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vbmi");
    },
    quantize,
    product<Avx512Vbmi>,
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
