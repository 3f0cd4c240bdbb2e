#include "ops.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "pool.h"
#include "scratch.h"

namespace moqa {
namespace {

constexpr int ITEM_TILES = 8;           // smallest number of tiles of a work item
// Smaller work is done before another thread has woken up. Between two products of one call threads hardly fall asleep;
// between two calls they do, and it takes 10 us to wake one.
constexpr size_t WAKE_BYTES = 1 << 17;
constexpr size_t CALL_BYTES = 1 << 19, CALL_PRODUCTS = 1 << 22;

// Tiles of a work item of a single product: eight per thread balance the load; larger items profit from prefetching.
int item_tiles(int tiles, int threads) { return std::max(ITEM_TILES, tiles / (8 * threads)); }

float to_float(uint16_t bits) {
    const uint32_t whole = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &whole, 4);
    return x;
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows of an array as floats: the array itself, or a copy.
const float* floats(Array x, size_t count, Scratch& memory) {
    if (!x.bfloat16) return static_cast<const float*>(x.data);
    float* copy = memory.get<float>(count);
    const auto* from = static_cast<const uint16_t*>(x.data);
    for (size_t i = 0; i < count; ++i) copy[i] = to_float(from[i]);
    return copy;
}

void write(Array y, const float* from, size_t begin, size_t count) {
    auto* to = static_cast<uint16_t*>(y.data) + begin;
    for (size_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

void add_bias(float* y, const float* bias, int first, int count) {
    if (bias != nullptr)
        for (int i = 0; i < count; ++i) y[i] += bias[first + i];
}

}  // namespace

void linear(const Path& path, const Matrix& m, Array x, int rows, const float* bias, Array y, int threads) {
    static thread_local QuantizedRows quantized;
    static thread_local Scratch copied, results;
    const float* values = floats(x, size_t(rows) * m.in, copied);
    quantized.shape(rows, m.in, m.group);
    for (int row = 0; row < rows; ++row) quantized.values[row] = values + size_t(row) * m.in;
    if (m.row_bytes() * m.out < CALL_BYTES && size_t(rows) * m.in * m.out < CALL_PRODUCTS) threads = 1;
    // thread-local variables would be those of other threads inside the work items
    const Rows& input = quantized;
    if (m.width != 16) {
        const int batch = 16;
        parallel(threads, (rows + batch - 1) / batch, [&](int item) {
            for (int row = item * batch; row < std::min(rows, (item + 1) * batch); ++row) path.quantize(input, row);
        });
    }
    float* out = y.bfloat16 ? results.get<float>(size_t(rows) * m.out) : static_cast<float*>(y.data);
    const int size = item_tiles(m.tiles(), threads);
    parallel(threads, (m.tiles() + size - 1) / size, [&](int item) {
        const int first = item * size, last = std::min(m.tiles(), first + size);
        const int begin = first * TILE, width = std::min(m.out, last * TILE) - begin;
        path.product(m, input, first, last, out + begin, m.out);
        for (int row = 0; row < rows; ++row) {
            const size_t at = size_t(row) * m.out + begin;
            add_bias(out + at, bias, begin, width);
            if (y.bfloat16) write(y, out + at, at, width);
        }
    });
}

void products(const Path& path, std::initializer_list<Product> list, const float* x, QuantizedRows& rows,
              int threads) {
    struct Piece {
        const Product* product;
        int first, last;
    };
    static thread_local std::vector<Piece> kept;
    std::vector<Piece>& work = kept;
    work.clear();
    size_t bytes = 0;
    int group = 0;
    for (const Product& product : list) {
        const Matrix& m = *product.matrix;
        if (m.group != group && m.width != 16) group = group == 0 ? m.group : -1;
        const int size = item_tiles(m.tiles(), threads);
        for (int tile = 0; tile < m.tiles(); tile += size)
            work.push_back({&product, tile, std::min(m.tiles(), tile + size)});
        bytes += m.row_bytes() * m.out;
    }
    if (group < 0) {  // inputs are quantized by group: matrices of different group sizes are multiplied one by one
        for (const Product& product : list) products(path, {product}, x, rows, threads);
        return;
    }
    const Matrix& any = *list.begin()->matrix;
    rows.shape(1, any.in, group == 0 ? any.group : group);
    rows.values[0] = x;
    if (group > 0) path.quantize(rows, 0);
    parallel(bytes < WAKE_BYTES ? 1 : threads, int(work.size()), [&](int item) {
        const auto [product, first, last] = work[item];
        const Matrix& m = *product->matrix;
        const int begin = first * TILE;
        path.product(m, rows, first, last, product->y + begin, m.out);
        add_bias(product->y + begin, product->bias, begin, std::min(m.out, last * TILE) - begin);
    });
}

namespace {

// The tokens of one expert, in the order in which they came.
struct Share {
    int expert, begin, count;  // its slots are begin .. begin + count in the order by expert
};

// Working data of one call; kept between calls to reuse its memory.
struct Call {
    Scratch copied, order_memory, inner_memory, out_memory;
    std::map<int, QuantizedRows> tokens;    // by group size
    QuantizedParts inputs, inners;          // two by share, for gate and up; and one
    std::vector<Share> shares;
    std::vector<PatchedShare> patched;      // by share and patch
    std::vector<std::pair<int, int>> work;  // share and first tile
};

// Which tokens go to which expert: slots sorted by expert, and a token's place among them.
void group_by_expert(Call& call, const int64_t* index, int slots, int experts, int* order, int* place) {
    std::vector<int> counts(experts + 1, 0);
    for (int slot = 0; slot < slots; ++slot)
        if (index[slot] >= 0 && index[slot] < experts) ++counts[index[slot] + 1];
    call.shares.clear();
    for (int e = 0; e < experts; ++e) {
        if (counts[e + 1] > 0) call.shares.push_back({e, counts[e], counts[e + 1]});
        counts[e + 1] += counts[e];
    }
    for (int slot = 0; slot < slots; ++slot) {
        const bool routed = index[slot] >= 0 && index[slot] < experts;
        place[slot] = routed ? counts[index[slot]]++ : -1;
        if (routed) order[place[slot]] = slot;
    }
}

void list_work(Call& call, const std::vector<const Matrix*>& matrices) {
    call.work.clear();
    for (int s = 0; s < int(call.shares.size()); ++s)
        for (int tile = 0; tile < matrices[call.shares[s].expert]->tiles(); tile += ITEM_TILES)
            call.work.push_back({s, tile});
}

// A share's rows out of all tokens' rows.
void gather(const Rows& all, const Share& share, const int* order, int top_k, Rows& to) {
    for (int i = 0; i < share.count; ++i) {
        const int token = order[share.begin + i] / top_k;
        to.values[i] = all.values[token];
        for (int g = 0; g < all.groups(); ++g) {
            const size_t from = size_t(g) * all.count + token, at = size_t(g) * share.count + i;
            std::memcpy(to.q + at * all.group, all.q + from * all.group, all.group);
            to.scale[at] = all.scale[from];
            to.sum[at] = all.sum[from];
        }
    }
}

}  // namespace

void experts(const Path& path, const Experts& e, Array x, int tokens, int top_k, const int64_t* index,
             const float* weights, Array y, int threads) {
    static thread_local Call kept;
    Call& call = kept;
    const int slots = tokens * top_k, hidden = e.gate[0]->in, inner = e.gate[0]->out, out = e.down[0]->out;
    int* order = call.order_memory.get<int>(2 * size_t(slots));
    int* place = order + slots;
    group_by_expert(call, index, slots, int(e.gate.size()), order, place);
    const int shares = int(call.shares.size());
    const float* values = floats(x, size_t(tokens) * hidden, call.copied);
    float* middle = call.inner_memory.get<float>(size_t(slots) * inner);
    float* results = call.out_memory.get<float>(size_t(slots) * out);

    // every token is quantized once per group size of the layer's matrices
    std::vector<int> sizes;
    for (const Share& share : call.shares)
        for (const Matrix* m : {e.gate[share.expert], e.up[share.expert]})
            if (std::find(sizes.begin(), sizes.end(), m->group) == sizes.end()) sizes.push_back(m->group);
    for (int size : sizes) {
        QuantizedRows& rows = call.tokens[size];
        rows.shape(tokens, hidden, size);
        for (int t = 0; t < tokens; ++t) rows.values[t] = values + size_t(t) * hidden;
        parallel(tokens < 16 ? 1 : threads, (tokens + 15) / 16, [&](int item) {
            for (int t = item * 16; t < std::min(tokens, item * 16 + 16); ++t) path.quantize(rows, t);
        });
    }

    // a single token needs no copy; others are gathered by share, once per group size
    call.inputs.parts.clear();
    for (const Share& share : call.shares) {
        const int gate = e.gate[share.expert]->group, up = e.up[share.expert]->group;
        const int copied = tokens == 1 && share.count == 1 ? 0 : share.count;
        call.inputs.parts.push_back({copied, hidden, gate});
        call.inputs.parts.push_back({up == gate ? 0 : copied, hidden, up});
    }
    call.inputs.place();
    std::vector<const Rows*> gate_rows(shares), up_rows(shares);
    parallel(tokens < 16 ? 1 : threads, shares, [&](int s) {
        const auto rows_for = [&](Rows& copy) -> const Rows* {
            const Rows& all = call.tokens.at(copy.group);
            if (copy.count == 0) return &all;
            gather(all, call.shares[s], order, top_k, copy);
            return &copy;
        };
        Rows &gate = call.inputs.parts[2 * s], &up = call.inputs.parts[2 * s + 1];
        gate_rows[s] = rows_for(gate);
        up_rows[s] = up.group == gate.group ? gate_rows[s] : rows_for(up);
    });

    const int patches = int(e.patches.size());
    if (int(call.patched.size()) < shares * patches) call.patched.resize(shares * patches);
    parallel(threads, shares * patches, [&](int item) {
        static thread_local std::vector<const float*> rows;
        const Share& share = call.shares[item / patches];
        rows.resize(share.count);
        for (int i = 0; i < share.count; ++i) rows[i] = values + size_t(order[share.begin + i] / top_k) * hidden;
        call.patched[item].first(path, *e.patches[item % patches], share.expert, share.count, rows.data());
    });

    list_work(call, e.gate);
    parallel(threads, int(call.work.size()), [&](int item) {
        static thread_local Scratch memory;
        const auto [s, first] = call.work[item];
        const Share& share = call.shares[s];
        const Matrix &gate = *e.gate[share.expert], &up = *e.up[share.expert];
        const int last = std::min(gate.tiles(), first + ITEM_TILES), begin = first * TILE;
        const int width = std::min(inner, last * TILE) - begin;
        float* ups = memory.get<float>(size_t(share.count) * width);
        float* gates = middle + size_t(share.begin) * inner + begin;
        path.product(gate, *gate_rows[s], first, last, gates, inner);
        path.product(up, *up_rows[s], first, last, ups, width);
        const size_t bias = size_t(share.expert) * inner;
        for (int i = 0; i < share.count; ++i) {
            for (int p = 0; p < patches; ++p)
                call.patched[s * patches + p].join(i, begin, width, gates + size_t(i) * inner, ups + size_t(i) * width);
            add_bias(gates + size_t(i) * inner, e.gate_bias ? e.gate_bias + bias : nullptr, begin, width);
            add_bias(ups + size_t(i) * width, e.up_bias ? e.up_bias + bias : nullptr, begin, width);
            path.activate(e.activation, gates + size_t(i) * inner, ups + size_t(i) * width, width);
        }
    });

    call.inners.parts.clear();
    for (const Share& share : call.shares) call.inners.parts.push_back({share.count, inner, e.down[share.expert]->group});
    call.inners.place();
    parallel(slots < 64 ? 1 : threads, shares, [&](int s) {
        const Share& share = call.shares[s];
        const Matrix& m = *e.down[share.expert];
        const Rows& rows = call.inners.parts[s];
        for (int p = 0; p < patches; ++p)
            call.patched[s * patches + p].choose(path, middle + size_t(share.begin) * inner, inner);
        for (int i = 0; i < share.count; ++i) {
            rows.values[i] = middle + size_t(share.begin + i) * inner;
            if (m.width != 16) path.quantize(rows, i);
        }
    });

    list_work(call, e.down);
    parallel(threads, int(call.work.size()), [&](int item) {
        const auto [s, first] = call.work[item];
        const Share& share = call.shares[s];
        const Matrix& m = *e.down[share.expert];
        const int last = std::min(m.tiles(), first + ITEM_TILES), begin = first * TILE;
        float* to = results + size_t(share.begin) * out + begin;
        path.product(m, call.inners.parts[s], first, last, to, out);
        for (int p = 0; p < patches; ++p) call.patched[s * patches + p].second(path, first, last, to, out);
        if (e.down_bias)
            for (int i = 0; i < share.count; ++i)
                add_bias(to + size_t(i) * out, e.down_bias + size_t(share.expert) * out, begin,
                         std::min(out, last * TILE) - begin);
    });

    // in the order of the token's own list, independent of the order of the experts
    parallel(tokens < 16 ? 1 : threads, (tokens + 15) / 16, [&](int item) {
        static thread_local Scratch memory;
        for (int t = item * 16; t < std::min(tokens, item * 16 + 16); ++t) {
            float* sum = y.bfloat16 ? memory.get<float>(out) : static_cast<float*>(y.data) + size_t(t) * out;
            std::fill(sum, sum + out, 0.0f);
            for (int k = 0; k < top_k; ++k) {
                const int slot = t * top_k + k;
                if (place[slot] < 0) continue;
                const float* from = results + size_t(place[slot]) * out;
                for (int i = 0; i < out; ++i) sum[i] += weights[slot] * from[i];
            }
            if (y.bfloat16) write(y, sum, size_t(t) * out, out);
        }
    });
}

uint64_t read(const Path& path, const void* data, size_t bytes, int threads) {
    constexpr size_t piece = 1 << 20;
    const auto* all = static_cast<const uint8_t*>(data);
    std::vector<uint64_t> sums(bytes / piece);
    parallel(threads, int(sums.size()), [&](int item) { sums[item] = path.read(all + item * piece, piece); });
    uint64_t total = 0;
    for (uint64_t sum : sums) total ^= sum;
    return total;
}

}  // namespace moqa
