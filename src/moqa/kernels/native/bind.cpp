// The Python interface: matrices by the addresses of tensors that the caller keeps alive. moqa/kernels/native.py checks
// dtypes, shapes and strides before it passes an address.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "decoder.h"

namespace nb = nanobind;
using namespace moqa;

namespace {

const Path* current = supported_paths().front();

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void set_path(const std::string& name) {
    for (const Path* path : supported_paths())
        if (path->name == name) {
            current = path;
            return;
        }
    throw std::invalid_argument("this processor has no path " + name);
}

// A layer from a dictionary; missing parts are null. Addresses are integers, matrices and experts are objects.
Layer layer_of(const nb::dict& d) {
    const auto floats = [&](const char* name) -> const float* {
        return d.contains(name) ? at<float>(nb::cast<uintptr_t>(d[name])) : nullptr;
    };
    const auto matrix = [&](const char* name) -> const Matrix* {
        return d.contains(name) ? nb::cast<const Matrix*>(d[name]) : nullptr;
    };
    const auto number = [&](const char* name) { return d.contains(name) ? nb::cast<int>(d[name]) : 0; };
    const float epsilon = nb::cast<float>(d["epsilon"]);
    Layer l{};
    l.before_attention = {floats("before_attention"), epsilon};
    l.before_mlp = {floats("before_mlp"), epsilon};
    l.attention = {matrix("q"),       matrix("k"),       matrix("v"),       matrix("o"),
                   floats("q_bias"),  floats("k_bias"),  floats("v_bias"),  floats("o_bias"),
                   {floats("q_norm"), epsilon},          {floats("k_norm"), epsilon},
                   nb::cast<bool>(d["norm_heads"]),      number("heads"),   number("kv_heads"),
                   number("head_dim"),                   nb::cast<float>(d["scale"])};
    l.router = {floats("router"), number("experts_count"), number("top_k"), bool(number("normalize"))};
    l.experts = d.contains("experts") ? nb::cast<const Experts*>(d["experts"]) : nullptr;
    l.mlp = {matrix("gate"), matrix("up"), matrix("down"), floats("share"), nb::cast<Activation>(d["activation"])};
    return l;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::enum_<Activation>(m, "Activation")
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("swiglu_clamped", Activation::swiglu_clamped);

    nb::class_<Matrix>(m, "Matrix")
        .def("__init__",
             [](Matrix* self, int out, int in, int width, int group, std::vector<uintptr_t> planes, uintptr_t scale,
                uintptr_t zero, bool half, uintptr_t dense, int code) {
                 planes.resize(3);
                 new (self) Matrix{out, in, width, group,
                                   {at<uint8_t>(planes[0]), at<uint8_t>(planes[1]), at<uint8_t>(planes[2])},
                                   at<uint16_t>(scale), at<uint8_t>(zero), half, at<uint16_t>(dense),
                                   width == 16 ? in : (in + BLOCK - 1) / BLOCK, Code(code)};
             });

    nb::class_<Channels>(m, "Channels")
        .def("__init__",
             [](Channels* self, const Matrix* matrix, std::vector<int> begin, std::vector<int> channel,
                std::vector<float> scale) {
                 new (self) Channels{matrix, std::move(begin), std::move(channel), std::move(scale)};
             },
             nb::arg("matrix").none(), nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 2>());
    nb::class_<Patch>(m, "Patch")
        .def("__init__",
             [](Patch* self, const Channels& gate, const Channels& up, const Channels& down, bool replaces) {
                 new (self) Patch{gate, up, down, replaces};
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());

    nb::class_<Experts>(m, "Experts")
        .def("__init__",
             [](Experts* self, std::vector<const Matrix*> gate, std::vector<const Matrix*> up,
                std::vector<const Matrix*> down, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias,
                Activation activation, std::vector<const Patch*> patches) {
                 new (self) Experts{std::move(gate), std::move(up), std::move(down), at<float>(gate_bias),
                                    at<float>(up_bias), at<float>(down_bias), activation, std::move(patches)};
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 9>());

    // a layer points to the matrices and experts in its dictionary, a decoder to those of its layers and to its head
    nb::class_<Layer>(m, "Layer")
        .def("__init__", [](Layer* self, nb::dict d) { new (self) Layer(layer_of(d)); }, nb::keep_alive<1, 2>());
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__", [](Decoder* self, const std::vector<const Layer*>& layers, uintptr_t norm, float epsilon,
                            const Matrix* head, int hidden) {
            std::vector<Layer> copies;
            for (const Layer* layer : layers) copies.push_back(*layer);
            new (self) Decoder{std::move(copies), {at<float>(norm), epsilon}, head, hidden};
        }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>());
    m.def("use_experts", [](Decoder& decoder, int layer, const Experts* experts, uintptr_t counts) {
        decoder.layers.at(layer).experts = experts;
        decoder.layers.at(layer).router.counts = at<int64_t>(counts);
    });
    nb::class_<Past>(m, "Past")
        .def("__init__", [](Past* self, const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values,
                            int capacity, bool bytes) {
            new (self) Past{{}, {}, capacity, bytes};
            for (uintptr_t address : keys) self->keys.push_back(at<char>(address));
            for (uintptr_t address : values) self->values.push_back(at<char>(address));
        });
    m.def("decode", [](const Decoder& decoder, const Past& past, uintptr_t embedding, int position, uintptr_t cos,
                       uintptr_t sin, int rotated, uintptr_t logits, int threads) {
        nb::gil_scoped_release free;
        decode(*current, decoder, past, at<float>(embedding), position, at<float>(cos), at<float>(sin), rotated,
               at<float>(logits), threads);
    });

    m.def("linear", [](const Matrix& matrix, uintptr_t x, uintptr_t y, bool bfloat16, int rows, uintptr_t bias,
                       int threads) {
        nb::gil_scoped_release free;
        linear(*current, matrix, {at<void>(x), bfloat16}, rows, at<float>(bias), {at<void>(y), bfloat16}, threads);
    });
    m.def("experts", [](const Experts& e, uintptr_t x, uintptr_t y, bool bfloat16, int tokens, int top_k,
                        uintptr_t index, uintptr_t weights, int threads) {
        nb::gil_scoped_release free;
        experts(*current, e, {at<void>(x), bfloat16}, tokens, top_k, at<int64_t>(index), at<float>(weights),
                {at<void>(y), bfloat16}, threads);
    });
    m.def("read", [](uintptr_t data, size_t bytes, int threads) {
        nb::gil_scoped_release free;
        return read(*current, at<void>(data), bytes, threads);
    });
    m.def("fit", [](int matrices, int rows, int in, int group, bool symmetric, bool half, bool bfloat16, uintptr_t weights,
                    uintptr_t width, uintptr_t importance, uintptr_t scale, uintptr_t zero, uintptr_t error,
                    uintptr_t integers, int threads) {
        nb::gil_scoped_release free;
        fit(*current, {matrices, rows, in, group, symmetric, half, bfloat16, at<void>(weights), at<uint8_t>(width),
                       at<float>(importance), at<uint16_t>(scale), at<uint8_t>(zero), at<float>(error),
                       at<uint8_t>(integers), {}}, threads);
    });
    m.def("fit_packed", [](int rows, int in, int group, bool symmetric, bool half, bool bfloat16, uintptr_t weights,
                           int width, uintptr_t scale, uintptr_t zero, std::vector<uintptr_t> planes, int threads) {
        nb::gil_scoped_release free;
        planes.resize(3);
        const std::vector<uint8_t> widths(rows, uint8_t(width));
        fit(*current, {1, rows, in, group, symmetric, half, bfloat16, at<void>(weights), widths.data(), nullptr,
                       at<uint16_t>(scale), at<uint8_t>(zero), nullptr, nullptr,
                       {at<uint8_t>(planes[0]), at<uint8_t>(planes[1]), at<uint8_t>(planes[2])}}, threads);
    });
    m.def("round", [](int matrices, int rows, int in, int group, int groups, int first, int columns, uintptr_t values,
                      uintptr_t work, uintptr_t factor, uintptr_t order, uintptr_t scale, uintptr_t offset,
                      uintptr_t top, uintptr_t integers, bool trellis, int apart, const std::vector<int>& begin,
                      uintptr_t width, int threads) {
        nb::gil_scoped_release free;
        round(*current, {matrices, rows, in, group, groups, first, columns, at<float>(values), at<float>(work),
                         at<float>(factor), at<int64_t>(order), at<float>(scale), at<float>(offset), at<float>(top),
                         at<uint8_t>(integers), trellis, apart, int(begin.size()) - 1, begin.data(), at<uint8_t>(width)},
              threads);
    });
    m.def("pack", [](int rows, int in, int width, uintptr_t integers, std::vector<uintptr_t> planes, int threads) {
        nb::gil_scoped_release free;
        planes.resize(3);
        pack(*current, {rows, in, width, at<uint8_t>(integers),
                        {at<uint8_t>(planes[0]), at<uint8_t>(planes[1]), at<uint8_t>(planes[2])}}, threads);
    });
    m.def("paths", [] {
        std::vector<std::string> names;
        for (const Path* path : supported_paths()) names.push_back(path->name);
        return names;
    });
    m.def("path", [] { return std::string(current->name); });
    m.def("set_path", set_path);
}
