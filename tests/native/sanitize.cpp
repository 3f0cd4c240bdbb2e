// Runs every kernel on buffers of exactly the size that it may touch, for the sanitizers, and compares with double
// precision. Every difference allowed is derived, as in tests/exact.py. Exits with 1 if a number is
// wrong; a sanitizer ends the program itself.
//
//   sanitize [seed]
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "decoder.h"

using namespace moqa;

namespace {

const double UNIT = std::ldexp(1.0, -24), UNIT_BFLOAT = std::ldexp(1.0, -8);
const double NO_NUMBER = std::numeric_limits<double>::quiet_NaN();

std::mt19937 source;

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(source); }
double random_real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(source); }
bool coin() { return random_int(0, 1) == 1; }
template <class T>
T one_of(std::initializer_list<T> values) {
    return values.begin()[random_int(0, int(values.size()) - 1)];
}

// An allocation of its own and of exactly this size, so that one byte too many is seen.
template <class T>
struct Buffer {
    size_t size = 0;
    std::unique_ptr<T[]> data;

    explicit Buffer(size_t count = 0) : size(count), data(count > 0 ? new T[count]() : nullptr) {}
    T& operator[](size_t i) { return data[i]; }
    const T& operator[](size_t i) const { return data[i]; }
    T* get() const { return data.get(); }
};

uint16_t to_bfloat16(double value) {
    const float x = float(value);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bfloat16(uint16_t stored) {
    const uint32_t bits = uint32_t(stored) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

double from_half(uint16_t stored) {
    const int exponent = stored >> 10 & 31, fraction = stored & 1023;
    return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
}

// Level of code `code` of a table or trellis, of which c1 and c2 are the coded bits 16 and 32 rows above.
int level_of(Code kind, int width, int code, int c1, int c2) {
    static const int sizes[][8] = {{63}, {19, 63}, {7, 22, 39, 63}, {3, 9, 15, 22, 29, 37, 48, 63},
                                   {19, 63}, {6, 21, 36, 63}, {3, 8, 14, 20, 27, 35, 46, 63}};
    const bool trellis = kind == Code::trellis;
    const int* upper = sizes[width - 1 + 4 * trellis];
    const int half = 1 << (width - !trellis), coded = code & 1;
    const int index = trellis ? 4 * (code >> 1) + 2 * (coded ^ c2) + c1 : code;
    return index < half ? -upper[half - 1 - index] : upper[index - half];
}

// A matrix as docs/format.md describes it, and its weights in double precision.
struct Stored {
    Matrix matrix{};
    std::array<Buffer<uint8_t>, 3> planes;
    Buffer<uint16_t> scale, dense;
    Buffer<uint8_t> zero;
    std::vector<double> weights, terms;  // s (q - o), and s (q + o): what is added up to get it

    Stored(int out, int in, int width, int group, bool symmetric, bool half, Code code) {
        matrix.out = out, matrix.in = in, matrix.width = width, matrix.group = group, matrix.half = half;
        matrix.code = code;
        weights.resize(size_t(out) * in);
        if (width == 16) {
            dense = Buffer<uint16_t>(weights.size());
            for (size_t i = 0; i < weights.size(); ++i) {
                dense[i] = to_bfloat16(random_real(-2, 2) / std::sqrt(in));
                weights[i] = from_bfloat16(dense[i]);
                terms.push_back(std::fabs(weights[i]));
            }
            matrix.dense = dense.get(), matrix.stride = in;
            return;
        }
        terms.resize(weights.size());
        if (code != Code::integers) {
            fill_coded();
            return;
        }
        matrix.stride = matrix.blocks();
        const int tiles = matrix.tiles(), blocks = matrix.blocks(), groups = matrix.groups(), top = (1 << width) - 1;
        scale = Buffer<uint16_t>(size_t(tiles) * groups * TILE);
        if (!symmetric) zero = Buffer<uint8_t>(scale.size);
        std::vector<uint8_t> integers(size_t(tiles) * TILE * blocks * BLOCK);
        for (int r = 0; r < out; ++r) {
            const int kind = random_int(0, 3);  // rows at the end of the range have the largest sums
            for (int g = 0; g < groups; ++g) {
                const size_t at = (size_t(r / TILE) * groups + g) * TILE + r % TILE;
                const double wanted = random_real(0.5, 4) / std::sqrt(in) / top;
                scale[at] = half ? uint16_t(random_int(0x1c00, 0x2800)) : to_bfloat16(wanted);
                if (!symmetric) zero[at] = uint8_t(random_int(0, 255));
                const double s = half ? from_half(scale[at]) : from_bfloat16(scale[at]);
                const double o = symmetric ? std::ldexp(1.0, width - 1) : zero[at] * double(top) / 255;
                for (int c = g * group; c < std::min(in, (g + 1) * group); ++c) {
                    const int q = kind == 0 ? top : kind == 1 ? top * (c & 1) : random_int(0, top);
                    integers[size_t(r) * blocks * BLOCK + c] = uint8_t(q);
                    weights[size_t(r) * in + c] = s * (q - o);
                    terms[size_t(r) * in + c] = s * (q + o);
                }
            }
        }
        pack(integers);
        matrix.scale = scale.get(), matrix.zero = zero.get();
    }

    // Any codes and factors, of rows beyond the last, too: the first rows of a trellis see those.
    void fill_coded() {
        const int tiles = matrix.tiles(), columns = matrix.blocks() * BLOCK, groups = matrix.groups();
        const int tall = tiles * TILE, width = matrix.width;
        scale = Buffer<uint16_t>(tall), zero = Buffer<uint8_t>(size_t(tiles) * groups * FACTOR_BYTES);
        std::vector<uint8_t> codes(size_t(tall) * columns);
        for (int r = 0; r < tall; ++r) {
            const int kind = random_int(0, 3);  // rows of one code have the largest sums
            const int top = (1 << width) - 1;
            for (int c = 0; c < columns; ++c)
                codes[size_t(r) * columns + c] = uint8_t(kind == 0 ? top : random_int(0, top));
            const double wanted = random_real(0.5, 4) / std::sqrt(matrix.in) / (63 * 63);
            scale[r] = matrix.half ? uint16_t(random_int(0x0010, 0x1800)) : to_bfloat16(wanted);
        }
        for (size_t i = 0; i < zero.size; ++i) zero[i] = uint8_t(random_int(0, 255));
        for (int r = 0; r < matrix.out; ++r)
            for (int c = 0; c < matrix.in; ++c) {
                const int place = r % TILE;
                const uint8_t* bytes = &zero[(size_t(r / TILE) * groups + c / matrix.group) * FACTOR_BYTES];
                const int low = bytes[place % 8] >> place / 8 * 4 & 15, high = bytes[8 + place % 4] >> place / 4 * 2 & 3;
                const auto code = [&](int row) { return int(codes[size_t((row + 2 * tall) % tall) * columns + c]); };
                const int level = level_of(matrix.code, width, code(r), code(r - TILE) & 1, code(r - 2 * TILE) & 1);
                const double s = (matrix.half ? from_half(scale[r]) : from_bfloat16(scale[r])) * (low + 16 * high);
                weights[size_t(r) * matrix.in + c] = s * level;
                terms[size_t(r) * matrix.in + c] = s * (level + 2 * LEVEL_ZERO);
            }
        pack(codes);
        matrix.scale = scale.get(), matrix.zero = zero.get();
    }

    void pack(const std::vector<uint8_t>& integers) {
        matrix.stride = matrix.blocks();
        const int tiles = matrix.tiles(), blocks = matrix.blocks();
        int shift = matrix.width;
        for (int n = 0; n < 3 && PLANES[matrix.width][n] > 0; ++n) {
            const int bits = PLANES[matrix.width][n], fields = 8 / bits;
            shift -= bits;
            planes[n] = Buffer<uint8_t>(size_t(tiles) * blocks * VECTOR * bits);
            for (int tile = 0; tile < tiles; ++tile)
                for (int block = 0; block < blocks; ++block)
                    for (int v = 0; v < 8; ++v)
                        for (int byte = 0; byte < VECTOR; ++byte) {
                            const int row = tile * TILE + byte / 4, column = block * BLOCK + 4 * v + byte % 4;
                            const int q = integers[size_t(row) * blocks * BLOCK + column] >> shift & ((1 << bits) - 1);
                            const size_t at = (size_t(tile) * blocks + block) * bits + v / fields;
                            planes[n][at * VECTOR + byte] |= uint8_t(q << (v % fields * bits));
                        }
            matrix.planes[n] = planes[n].get();
        }
    }
};

Stored random_matrix(int out, int in, int width, int group) {
    const Code code = width < 4 ? one_of({Code::integers, Code::table, Code::trellis})
                      : width == 4 && coin() ? Code::table : Code::integers;
    return Stored(out, in, width, group, width > 1 && coin(), coin(), code);
}

// Numbers in double precision and how far a sound kernel may be from each.
struct Bounded {
    std::vector<double> value, bound;

    explicit Bounded(size_t count = 0) : value(count), bound(count) {}
};

// Rounds to 8 bits per group, half to even. A value next to the middle of two steps may go to either.
Bounded rounded(const Bounded& x, int group) {
    const int in = int(x.value.size());
    Bounded out(in);
    for (int begin = 0; begin < in; begin += group) {
        const int end = std::min(in, begin + group);
        double largest = 0, worst = 0;
        bool broken = false;
        for (int i = begin; i < end; ++i) {
            largest = std::max(largest, std::fabs(x.value[i])), worst = std::max(worst, x.bound[i]);
            broken |= !std::isfinite(x.value[i]);
        }
        const double scale = largest / 127;
        for (int i = begin; i < end; ++i) {
            const double steps = scale > 0 ? x.value[i] / scale : 0;
            const double reach = (scale > 0 ? (x.bound[i] + worst) / scale : 0) + 1e-4;
            const bool unsure = std::fabs(steps - std::floor(steps) - 0.5) <= reach || reach > 0.5;
            out.value[i] = broken ? NO_NUMBER : std::nearbyint(steps) * scale;
            out.bound[i] = (unsure ? scale * std::ceil(reach) : 0) + worst;
            if (scale < 2e-36) out.bound[i] += std::fabs(x.value[i]) + scale;
        }
    }
    return out;
}

Bounded product(const Stored& m, const Bounded& given, const float* bias) {
    const int in = m.matrix.in, out = m.matrix.out;
    const bool packed = m.matrix.width != 16;
    const Bounded x = packed ? rounded(given, m.matrix.group) : given;
    const double additions = packed ? m.matrix.groups() + 8 : in + 8;
    Bounded y(out);
    for (int r = 0; r < out; ++r) {
        const double *w = &m.weights[size_t(r) * in], *t = &m.terms[size_t(r) * in];
        double value = 0, error = 0, terms = 0;
        for (int i = 0; i < in; ++i) {
            value += w[i] * x.value[i];
            error += std::fabs(w[i]) * x.bound[i];
            terms += t[i] * (std::fabs(x.value[i]) + x.bound[i]);
        }
        y.value[r] = value, y.bound[r] = error + additions * UNIT * terms;
        if (bias != nullptr) {
            y.value[r] += bias[r];
            y.bound[r] += 2 * UNIT * (std::fabs(bias[r]) + std::fabs(y.value[r]));
        }
    }
    return y;
}

// Inputs as a caller has them, and as numbers.
struct Inputs {
    Buffer<float> floats;
    Buffer<uint16_t> shorts;
    std::vector<Bounded> rows;
    bool bfloat16;

    Inputs(int count, int in, bool bf, bool broken)
        : floats(bf ? 0 : size_t(count) * in), shorts(bf ? size_t(count) * in : 0), bfloat16(bf) {
        for (int r = 0; r < count; ++r) {
            Bounded row(in);
            const double size = std::pow(10, random_real(-3, 3)) * (random_int(0, 9) == 0 ? 0 : 1);
            for (int i = 0; i < in; ++i) {
                double value = random_int(0, 9) == 0 ? 0 : random_real(-1, 1) * size;
                if (broken && r == count / 2 && i == in / 2) value = coin() ? NO_NUMBER : HUGE_VAL;
                const size_t at = size_t(r) * in + i;
                if (bf) {
                    shorts[at] = std::isnan(value) ? 0x7fc1 : to_bfloat16(value);
                    row.value[i] = from_bfloat16(shorts[at]);
                } else {
                    row.value[i] = floats[at] = float(value);
                }
            }
            rows.push_back(std::move(row));
        }
    }

    Array array() const { return {bfloat16 ? static_cast<void*>(shorts.get()) : floats.get(), bfloat16}; }
};

struct Outputs {
    Buffer<float> floats;
    Buffer<uint16_t> shorts;
    bool bfloat16;

    // what is not written must not pass for a number
    Outputs(size_t count, bool bf) : floats(bf ? 0 : count), shorts(bf ? count : 0), bfloat16(bf) {
        if (bf)
            std::fill(shorts.get(), shorts.get() + count, 0x4e93);
        else
            std::fill(floats.get(), floats.get() + count, 1.2345e9f);
    }
    Array array() const { return {bfloat16 ? static_cast<void*>(shorts.get()) : floats.get(), bfloat16}; }
    double operator[](size_t i) const { return bfloat16 ? from_bfloat16(shorts[i]) : floats[i]; }
};

bool same(const Outputs& a, const Outputs& b) {
    return a.floats.size + a.shorts.size == 0 ||
           std::memcmp(a.array().data, b.array().data, a.bfloat16 ? a.shorts.size * 2 : a.floats.size * 4) == 0;
}

Buffer<float> random_floats(size_t count, bool present) {
    Buffer<float> values(present ? count : 0);
    for (size_t i = 0; i < values.size; ++i) values[i] = float(random_real(-1, 1));
    return values;
}

int failures = 0, cases = 0;

void fail(const std::string& what) {
    if (++failures <= 20) std::fprintf(stderr, "%s\n", what.c_str());
}

// `wanted` is by row; one that is no number must come out as none.
void compare(const Outputs& y, const std::vector<Bounded>& wanted, const std::string& name) {
    ++cases;
    size_t at = 0;
    for (size_t r = 0; r < wanted.size(); ++r)
        for (size_t i = 0; i < wanted[r].value.size(); ++i, ++at) {
            const double value = wanted[r].value[i], bound = wanted[r].bound[i];
            const double reach = bound + (y.bfloat16 ? 1.01 * UNIT_BFLOAT * (std::fabs(value) + bound) : 0) + 1e-37;
            const bool right = std::isfinite(value) ? std::fabs(y[at] - value) <= reach : !std::isfinite(y[at]);
            if (!right) {
                char numbers[200];
                std::snprintf(numbers, sizeof(numbers), ": [%zu, %zu] is %.9g, should be %.9g within %.3g", r, i, y[at],
                              value, reach);
                return fail(name + numbers);
            }
        }
}

std::string describe(const Matrix& m) {
    return "[" + std::to_string(m.out) + ", " + std::to_string(m.in) + "] " + std::to_string(m.width) + " bits in " +
           std::to_string(m.group) + (m.zero ? "" : " symmetric") + (m.half ? " half" : "") +
           (m.code == Code::table ? " table" : m.code == Code::trellis ? " trellis" : "");
}

const std::vector<const Path*> PATHS = supported_paths();

void check_linear(int out, int in, int width, int group, int rows, bool broken = false) {
    const Stored m = random_matrix(out, in, width, group);
    const Inputs x(rows, in, coin(), broken);
    const Buffer<float> bias = random_floats(out, coin());
    std::vector<Bounded> wanted;
    for (const Bounded& row : x.rows) wanted.push_back(product(m, row, bias.get()));
    for (const Path* path : PATHS) {
        const std::string name = std::string(path->name) + " linear " + describe(m.matrix) + ", " +
                                 std::to_string(rows) + (x.bfloat16 ? " bfloat16" : " float32") + " rows";
        Outputs first(size_t(rows) * out, x.bfloat16);
        const int threads = random_int(1, 3);
        linear(*path, m.matrix, x.array(), rows, bias.get(), first.array(), threads);
        compare(first, wanted, name);
        Outputs again(size_t(rows) * out, x.bfloat16);
        linear(*path, m.matrix, x.array(), rows, bias.get(), again.array(), threads % 3 + 1);
        if (!same(first, again)) fail(name + ": another number of threads gives other numbers");
    }
}

Bounded activated(Activation kind, const Bounded& gate, const Bounded& up) {
    Bounded inner(gate.value.size());
    for (size_t i = 0; i < inner.value.size(); ++i) {
        double g = gate.value[i], u = up.value[i];
        if (kind == Activation::swiglu_clamped) g = std::min(g, 7.0), u = std::min(std::max(u, -7.0), 7.0) + 1;
        const double z = kind == Activation::silu             ? g
                         : kind == Activation::swiglu_clamped ? 1.702 * g
                                                              : 2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
        const double share = kind == Activation::gelu ? 0.5 * std::erfc(-g / std::sqrt(2.0)) : 1 / (1 + std::exp(-z));
        const double spread = std::fabs(u) + up.bound[i];
        inner.value[i] = g * share * u;
        // none of the activations is steeper than 1.13
        inner.bound[i] = 1.13 * gate.bound[i] * spread + std::fabs(g * share) * up.bound[i] +
                         16 * UNIT * (std::fabs(gate.value[i]) + gate.bound[i]) * spread + 1e-36;
    }
    return inner;
}

// Some rows of gate or up, or columns of down, of all experts; sometimes none.
struct RandomChannels {
    std::vector<Stored> matrix;
    Channels channels{};

    RandomChannels(int experts, int inner, int hidden, bool columns) {
        const double share = one_of({0.0, 0.05, 0.3, 1.0});
        for (int e = 0; e < experts; ++e) {
            channels.begin.push_back(int(channels.channel.size()));
            for (int c = 0; c < inner; ++c)
                if (random_real(0, 1) < share) channels.channel.push_back(c);
        }
        const int count = int(channels.channel.size());
        channels.begin.push_back(count);
        if (count == 0) return;
        const int width = one_of({1, 2, 3, 4, 8, 16});
        if (columns) {
            matrix.push_back(random_matrix(hidden, count, width, 1 << 16));
            for (int i = 0; i < count; ++i) channels.scale.push_back(float(random_real(0.5, 2)));
        } else {
            matrix.push_back(random_matrix(count, hidden, width, one_of({32, 64, 256})));
        }
        channels.matrix = &matrix[0].matrix;
    }
};

// An adjustment's channels: their numbers are checked from Python, here that they touch no memory of others.
void check_patched(const Path& path, Experts e, int inner, int hidden, const Inputs& x, int tokens, int top_k,
                   const Buffer<int64_t>& index, const Buffer<float>& weights, const std::string& name) {
    const int count = int(e.gate.size());
    std::vector<std::unique_ptr<RandomChannels>> parts;
    std::vector<Patch> patches;
    for (int p = 0; p < 2; ++p) {
        for (int i = 0; i < 3; ++i) parts.push_back(std::make_unique<RandomChannels>(count, inner, hidden, i == 2));
        patches.push_back({parts[3 * p]->channels, parts[3 * p + 1]->channels, parts[3 * p + 2]->channels, p == 1});
    }
    for (const Patch& patch : patches) e.patches.push_back(&patch);
    Outputs first(size_t(tokens) * hidden, x.bfloat16), again(size_t(tokens) * hidden, x.bfloat16);
    experts(path, e, x.array(), tokens, top_k, index.get(), weights.get(), first.array(), 1);
    experts(path, e, x.array(), tokens, top_k, index.get(), weights.get(), again.array(), 3);
    if (!same(first, again)) fail(name + ": patched, depends on the number of threads");
}

void check_experts(int count, int hidden, int inner, int tokens, int top_k, Activation kind, bool broken = false) {
    std::vector<Stored> parts[3];
    Experts e{};
    std::vector<const Matrix*>* lists[] = {&e.gate, &e.up, &e.down};
    std::string name = " experts";
    for (int p = 0; p < 3; ++p) {
        for (int i = 0; i < count; ++i)
            parts[p].push_back(random_matrix(p == 2 ? hidden : inner, p == 2 ? inner : hidden,
                                             one_of({2, 3, 4, 5, 8, 16}), one_of({32, 64, 64, 128})));
        for (const Stored& m : parts[p]) lists[p]->push_back(&m.matrix), name += " " + describe(m.matrix);
    }
    const Buffer<float> biases[] = {random_floats(size_t(count) * inner, coin()),
                                    random_floats(size_t(count) * inner, coin()),
                                    random_floats(size_t(count) * hidden, coin())};
    e.gate_bias = biases[0].get(), e.up_bias = biases[1].get(), e.down_bias = biases[2].get(), e.activation = kind;
    const Inputs x(tokens, hidden, coin(), broken);
    Buffer<int64_t> index(size_t(tokens) * top_k);
    Buffer<float> weights(index.size);
    for (size_t slot = 0; slot < index.size; ++slot) {
        const bool none = random_int(0, 9) == 0;
        index[slot] = none ? one_of<int64_t>({count, count + 7, int64_t(1) << 40}) : random_int(0, count - 1);
        weights[slot] = float(random_real(0, 1));
    }
    std::vector<Bounded> wanted;
    for (int t = 0; t < tokens; ++t) {
        Bounded sum(hidden);
        for (int k = 0; k < top_k; ++k) {
            const size_t slot = size_t(t) * top_k + k;
            if (index[slot] >= count) continue;
            const int expert = int(index[slot]);
            const auto bias = [&](int p, int width) {
                return biases[p].size > 0 ? biases[p].get() + size_t(expert) * width : nullptr;
            };
            const Bounded gate = product(parts[0][expert], x.rows[t], bias(0, inner));
            const Bounded up = product(parts[1][expert], x.rows[t], bias(1, inner));
            const Bounded out = product(parts[2][expert], activated(kind, gate, up), bias(2, hidden));
            for (int i = 0; i < hidden; ++i) {
                sum.value[i] += weights[slot] * out.value[i];
                sum.bound[i] += weights[slot] * (out.bound[i] + 2 * UNIT * (std::fabs(out.value[i]) + out.bound[i])) +
                                top_k * UNIT * std::fabs(sum.value[i]);
            }
        }
        wanted.push_back(std::move(sum));
    }
    name = std::to_string(tokens) + " tokens, top " + std::to_string(top_k) + ", activation " +
           std::to_string(int(kind)) + (x.bfloat16 ? ", bfloat16" : ", float32") + name;
    for (const Path* path : PATHS) {
        Outputs first(size_t(tokens) * hidden, x.bfloat16);
        const int threads = random_int(1, 3);
        experts(*path, e, x.array(), tokens, top_k, index.get(), weights.get(), first.array(), threads);
        compare(first, wanted, std::string(path->name) + " " + name);
        Outputs again(size_t(tokens) * hidden, x.bfloat16);
        experts(*path, e, x.array(), tokens, top_k, index.get(), weights.get(), again.array(), threads % 3 + 1);
        if (!same(first, again)) fail(std::string(path->name) + " " + name + ": depends on the number of threads");
        check_patched(*path, e, inner, hidden, x, tokens, top_k, index, weights, std::string(path->name) + " " + name);
    }
}

// Several matrices for one row, as a decoder needs them.
void check_products(int in, bool mixed) {
    std::vector<Stored> parts;
    for (int i = 0; i < 3; ++i)
        parts.push_back(random_matrix(random_int(1, 200), in, one_of({2, 3, 4, 8, 16}), mixed ? one_of({32, 64}) : 64));
    const Inputs x(1, in, false, false);
    std::vector<Buffer<float>> biases;
    for (const Stored& m : parts) biases.push_back(random_floats(m.matrix.out, coin()));
    for (const Path* path : PATHS) {
        std::vector<Outputs> found;
        for (const Stored& m : parts) found.emplace_back(m.matrix.out, false);
        QuantizedRows rows;
        const auto part = [&](int i) {
            return Product{&parts[i].matrix, biases[i].get(), static_cast<float*>(found[i].array().data)};
        };
        products(*path, {part(0), part(1), part(2)}, x.floats.get(), rows, random_int(1, 3));
        for (int i = 0; i < 3; ++i)
            compare(found[i], {product(parts[i], x.rows[0], biases[i].get())},
                    std::string(path->name) + " products " + describe(parts[i].matrix));
    }
}

// Callers on threads of their own share the pool, and nothing else.
void check_callers() {
    const Stored m = random_matrix(300, 200, 4, 64);
    const Inputs x(40, 200, true, false);
    const auto compute = [&] {
        Outputs y(40 * 300, true);
        linear(*PATHS[0], m.matrix, x.array(), 40, nullptr, y.array(), 3);
        return y;
    };
    const Outputs wanted = compute();
    std::vector<std::thread> callers;
    std::atomic<int> wrong{0};
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&] {
            for (int round = 0; round < 10; ++round) wrong += !same(compute(), wanted);
        });
    for (std::thread& caller : callers) caller.join();
    ++cases;
    if (wrong > 0) fail("callers on several threads disturb each other");
}

// Memory and threads of the decoder; that it computes what transformers does is tested in Python.
void check_decoder(int hidden, int heads, int kv_heads, int head_dim, bool routed, int tokens) {
    const int width = random_int(1, 70), count = 3, vocabulary = random_int(1, 90), rotated = head_dim / 2 * 2;
    std::deque<Stored> matrices;
    std::deque<Buffer<float>> kept;
    const auto matrix = [&](int out, int in) {
        matrices.push_back(random_matrix(out, in, one_of({2, 3, 4, 8, 16}), one_of({32, 64})));
        return &matrices.back().matrix;
    };
    const auto floats = [&](size_t size) {
        kept.push_back(random_floats(size, true));
        return kept.back().get();
    };
    Experts e{};
    for (int i = 0; i < count; ++i) {
        e.gate.push_back(matrix(width, hidden)), e.up.push_back(matrix(width, hidden));
        e.down.push_back(matrix(hidden, width));
    }
    Layer layer{};
    layer.before_attention = {floats(hidden), 1e-6f}, layer.before_mlp = {floats(hidden), 1e-6f};
    const int queries = heads * head_dim, keys = kv_heads * head_dim;
    const bool norm_heads = coin();
    layer.attention = {matrix(queries, hidden), matrix(keys, hidden), matrix(keys, hidden), matrix(hidden, queries),
                       floats(queries), floats(keys), nullptr, floats(hidden),
                       {floats(norm_heads ? head_dim : queries), 1e-6f}, {floats(norm_heads ? head_dim : keys), 1e-6f},
                       norm_heads, heads, kv_heads, head_dim, 0.3f};
    if (routed) layer.router = {floats(size_t(count) * hidden), count, 2, coin()}, layer.experts = &e;
    if (!routed || coin())
        layer.mlp = {matrix(width, hidden), matrix(width, hidden), matrix(hidden, width),
                     routed ? floats(hidden) : nullptr, Activation::silu};
    const Decoder decoder{{layer, layer}, {floats(hidden), 1e-6f}, matrix(vocabulary, hidden), hidden};
    const Buffer<float> embedding = random_floats(hidden, true), angles = random_floats(rotated, true);
    for (const Path* path : PATHS) {
        std::vector<Buffer<float>> found;
        const bool bytes = coin();
        for (int threads : {1, 3}) {
            Past places{{}, {}, tokens, bytes};
            std::vector<Buffer<char>> past;
            for (int i = 0; i < 4; ++i) past.emplace_back(size_t(kv_heads) * tokens * places.state(head_dim));
            places.keys = {past[0].get(), past[1].get()}, places.values = {past[2].get(), past[3].get()};
            found.emplace_back(vocabulary);
            for (int position = 0; position < tokens; ++position)
                decode(*path, decoder, places, embedding.get(), position, angles.get(), angles.get(), rotated,
                       found.back().get(), threads);
        }
        ++cases;
        for (int i = 0; i < vocabulary; ++i)
            if (!std::isfinite(found[0][i]) || found[0][i] != found[1][i])
                return fail(std::string(path->name) + " decoder: not finite, or depends on the number of threads");
    }
}

// What is packed while it is fitted is what is fitted and then packed.
void check_planes(const Path& path, Fitting f, int bits, int threads) {
    const size_t tiles = (f.rows + TILE - 1) / TILE, scales = tiles * TILE * f.groups();
    Buffer<uint8_t> width(f.rows), integers(size_t(f.rows) * f.in), zero(scales);
    Buffer<uint16_t> scale(scales);
    Buffer<float> error(scales);
    std::fill(width.get(), width.get() + f.rows, uint8_t(bits));
    f.width = width.get(), f.scale = scale.get(), f.zero = f.symmetric ? nullptr : zero.get();
    std::array<Buffer<uint8_t>, 6> planes;
    for (int i = 0; i < 6; ++i)
        planes[i] = Buffer<uint8_t>(tiles * ((f.in + BLOCK - 1) / BLOCK) * VECTOR * PLANES[bits][i % 3]);
    f.error = error.get(), f.integers = integers.get();
    fit(path, f, threads);
    pack(path, {f.rows, f.in, bits, integers.get(), {planes[0].get(), planes[1].get(), planes[2].get()}}, threads);
    f.error = nullptr, f.integers = nullptr;
    for (int i = 0; i < 3; ++i) f.planes[i] = planes[3 + i].get();
    fit(path, f, threads);
    for (int i = 0; i < 3; ++i)
        if (!std::equal(planes[i].get(), planes[i].get() + planes[i].size, planes[3 + i].get()))
            return fail(std::string(path.name) + " fit: other planes than those of its integers");
}

// Memory and threads of the loops of quantization; what they find is tested in Python.
void check_solving(int matrices, int rows, int in, int group, bool symmetric, bool half, bool weighted) {
    const int groups = (in + group - 1) / group;
    const size_t all_rows = size_t(matrices) * rows, weights = all_rows * in, scales = all_rows * groups;
    const Buffer<float> values = random_floats(weights, true);
    Buffer<float> importance = random_floats(size_t(matrices) * in, true);
    for (int i = 0; i < matrices * in; ++i) importance[i] = std::fabs(importance[i]);
    Buffer<uint8_t> width(all_rows);
    for (size_t i = 0; i < all_rows; ++i) width[i] = uint8_t(random_int(1, 8));
    const Buffer<float> factor = random_floats(size_t(matrices) * in * in, true);
    const Buffer<float> tables = random_floats(3 * scales, true);
    Buffer<int64_t> order(size_t(matrices) * in);
    for (int i = 0; i < matrices * in; ++i) order[i] = in - 1 - i % in;
    for (const Path* path : PATHS) {
        std::vector<Buffer<uint8_t>> found;
        for (int threads : {1, 3}) {
            Buffer<uint16_t> scale(scales);
            Buffer<uint8_t> zero(scales);
            Buffer<float> error(scales);
            found.emplace_back(weights);
            fit(*path, {matrices, rows, in, group, symmetric, half, false, values.get(), width.get(),
                        weighted ? importance.get() : nullptr, scale.get(), symmetric ? nullptr : zero.get(),
                        error.get(), found.back().get(), {}}, threads);
            check_planes(*path, {1, rows, in, group, symmetric, half, false, values.get(), nullptr, nullptr, nullptr, nullptr,
                                 nullptr, nullptr, {}}, symmetric ? random_int(2, 8) : random_int(1, 8), threads);
            Buffer<float> work = random_floats(weights, true);
            Buffer<uint8_t> integers(weights);
            for (int first = 0; first < in; first += 64) {
                const int columns = std::min(64, in - first);
                const Buffer<float> now = random_floats(all_rows * columns, true);
                round(*path, {matrices, rows, in, group, groups, first, columns, now.get(), work.get(), factor.get(),
                              order.get(), tables.get(), tables.get() + scales, tables.get() + 2 * scales,
                              integers.get(), false, 16, 0, nullptr, nullptr}, threads);
            }
        }
        ++cases;
        for (size_t i = 0; i < weights; ++i)
            if (found[0][i] != found[1][i] || found[0][i] > 255 >> (8 - width[i / in]))
                return fail(std::string(path->name) + " fit: outside of the grid, or depends on the number of threads");
    }
}

// The same for codes.
void check_coding(int matrices, const std::vector<int>& parts, int in, int group, bool trellis, bool passed_on, int apart) {
    const int groups = (in + group - 1) / group, count = int(parts.size());
    std::vector<int> begin{0};
    for (int rows : parts) begin.push_back(begin.back() + rows);
    const int rows = begin.back();
    const size_t all_rows = size_t(matrices) * rows, weights = all_rows * in;
    Buffer<uint8_t> width(size_t(matrices) * count);
    for (size_t i = 0; i < width.size; ++i) width[i] = uint8_t(random_int(1, trellis ? 3 : 4));
    Buffer<float> scale = random_floats(all_rows * groups, true);
    for (size_t i = 0; i < scale.size; ++i) scale[i] = random_int(0, 9) == 0 ? 0.0f : std::fabs(scale[i]) / 40 + 1e-3f;
    const Buffer<float> start = random_floats(weights, true);
    const Buffer<float> factor = random_floats(size_t(matrices) * in * in, passed_on);
    Buffer<int64_t> order(size_t(matrices) * in);
    for (int i = 0; i < matrices * in; ++i) order[i] = in - 1 - i % in;
    for (const Path* path : PATHS) {
        std::vector<Buffer<uint8_t>> found;
        for (int threads : {1, 3}) {
            Buffer<float> work(weights);
            std::copy(start.get(), start.get() + weights, work.get());
            found.emplace_back(weights);
            for (int first = 0; first < in; first += 64) {
                const int columns = std::min(64, in - first);
                Buffer<float> now(all_rows * columns);
                for (int m = 0; m < matrices; ++m)
                    std::copy_n(start.get() + (size_t(m) * in + first) * rows, size_t(columns) * rows,
                                now.get() + size_t(m) * columns * rows);
                round(*path, {matrices, rows, in, group, groups, first, columns, now.get(), work.get(), factor.get(),
                              order.get(), scale.get(), nullptr, nullptr, found.back().get(), trellis, apart, count,
                              begin.data(), width.get()}, threads);
            }
        }
        ++cases;
        const std::string name = std::string(path->name) + (trellis ? " trellis" : " table");
        for (int m = 0; m < matrices; ++m)
            for (int c = 0; c < in; ++c)
                for (int part = 0; part < count; ++part)
                    for (int r = begin[part]; r < begin[part + 1]; ++r) {
                        const size_t at = (size_t(m) * in + c) * rows + r;
                        if (found[0][at] != found[1][at]) return fail(name + ": depends on the number of threads");
                        if (found[0][at] >> width[size_t(m) * count + part]) return fail(name + ": not a code");
                    }
    }
}

}  // namespace

int main(int argc, char** argv) {
    source.seed(argc > 1 ? unsigned(std::atoi(argv[1])) : 1u);
    const auto start = std::chrono::steady_clock::now();
    const int shapes[][2] = {{1, 1}, {16, 32}, {15, 31}, {17, 33}, {40, 100}, {3, 130}, {64, 64}, {130, 65}};
    for (int group : {32, 64, 96})
        for (const auto& shape : shapes)
            for (int kind = 0; kind < 8; ++kind)
                check_solving(random_int(1, 3), shape[0], shape[1], group, kind & 1, kind & 2, kind & 4);
    for (const std::vector<int>& parts : {std::vector<int>{1}, {16}, {15, 1}, {40}, {33, 16, 130}, {3, 3, 3, 64}})
        for (int in : {1, 33, 130})
            for (int kind = 0; kind < 4; ++kind)
                check_coding(random_int(1, 3), parts, in, one_of({32, 64}), kind & 1, kind & 2, one_of({4, 16}));
    for (int width : {1, 2, 3, 4, 5, 6, 7, 8, 16})
        for (int group : {32, 64, 128}) {
            for (const auto& shape : shapes)
                for (int rows : {1, 2, 3, 4, 5, 6, 7, 13, 14, 17}) check_linear(shape[0], shape[1], width, group, rows);
            // several pieces of work, and rows beyond one chunk of them
            for (int rows : {1, 2, 18, 96, 97, 130}) check_linear(150, 140, width, group, rows);
            for (int rows : {1, 3, 9, 100}) check_linear(random_int(1, 90), random_int(1, 300), width, group, rows);
            for (int rows : {1, 3, 20}) check_linear(20, 70, width, group, rows, true);
            check_linear(5, 5, width, group, 0);
        }
    // large enough for several threads on a single row
    for (int width : {3, 8, 16}) check_linear(700, 530, width, 64, 1);
    const auto kinds = {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::swiglu_clamped};
    for (int round = 0; round < 8; ++round)
        for (Activation kind : kinds) {
            for (int tokens : {1, 2, 5, 16, 40})
                check_experts(random_int(1, 9), random_int(1, 100), random_int(1, 100), tokens, random_int(1, 4), kind);
            check_experts(3, 60, 150, 20, 2, kind, true);
        }
    check_experts(4, 150, 300, 130, 2, Activation::silu);
    check_experts(2, 10, 20, 0, 2, Activation::silu);
    for (int round = 0; round < 6; ++round) {
        check_decoder(random_int(1, 100), 4, 2, random_int(1, 20), round % 2 == 0, random_int(1, 9));
        check_decoder(64, 3, 1, 16, round % 2 == 1, 40);
    }
    for (int in : {1, 33, 200})
        for (bool mixed : {false, true}) check_products(in, mixed);
    check_callers();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::string names;
    for (const Path* path : PATHS) names += std::string(" ") + path->name;
    std::printf("%d cases on%s in %.1f s: %d wrong\n", cases, names.c_str(), seconds, failures);
    return failures > 0 ? 1 : 0;
}
