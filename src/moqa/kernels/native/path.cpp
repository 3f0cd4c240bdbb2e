#include "path.h"

namespace moqa {

std::vector<const Path*> supported_paths() {
    std::vector<const Path*> found;
#ifdef MOQA_X86
    for (const Path* path : {&avx512vbmi_path, &avx512_path, &avx2_path})
        if (path->supported()) found.push_back(path);
#endif
    found.push_back(&portable_path);
    return found;
}

}  // namespace moqa
