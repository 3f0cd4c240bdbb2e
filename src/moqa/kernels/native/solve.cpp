#include "solve.h"

#include "path.h"
#include "pool.h"

namespace moqa {

void fit(const Path& path, const Fitting& f, int threads) {
    const int tiles = (f.rows + TILE - 1) / TILE;
    parallel(threads, f.matrices * tiles, [&](int item) { path.fit(f, item / tiles, item % tiles); });
}

void round(const Path& path, const Rounding& r, int threads) {
    if (r.parts > 0) {
        const int lanes = (r.apart + path.lanes - 1) / path.lanes, pieces = r.parts * lanes;
        parallel(threads, r.matrices * pieces, [&](int item) {
            path.round_codes(r, item / pieces, item % pieces / lanes, item % lanes * path.lanes);
        });
        return;
    }
    const int items = (r.rows + ROUND_ROWS - 1) / ROUND_ROWS;
    parallel(threads, r.matrices * items, [&](int item) { path.round(r, item / items, item % items); });
}

void pack(const Path& path, const Packing& p, int threads) {
    parallel(threads, (p.rows + TILE - 1) / TILE, [&](int tile) { path.pack(p, tile); });
}

}  // namespace moqa
