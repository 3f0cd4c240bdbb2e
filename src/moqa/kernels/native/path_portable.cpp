#include "codes.h"
#include "columns.h"
#include "grid.h"
#include "isa_portable.h"
#include "packing.h"
#include "product.h"

namespace moqa {

const Path portable_path = {
    "portable",
    [] {
        return true;
    },
    quantize,
    product<Portable>,
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
