// Channels of experts that an adjustment gives bits of their own, computed in the same call as the packed ones.
#pragma once

#include <vector>

#include "path.h"
#include "rows.h"

namespace moqa {

// Rows of gate or up, or columns of down, of all experts of a layer, expert by expert.
struct Channels {
    const Matrix* matrix;      // [channels, hidden], or [hidden, channels] with one group of them all; null: none
    std::vector<int> begin;    // [experts + 1]: an expert's are begin[e] ... begin[e + 1] - 1
    std::vector<int> channel;  // [channels] which of the expert's, ascending within it
    std::vector<float> scale;  // [channels] of down: what multiplies a channel's input

    int count(int expert) const { return matrix == nullptr ? 0 : begin[expert + 1] - begin[expert]; }
};

// Products with these channels are added to those of the packed matrices, or replace them; a channel that one patch
// replaces is in no other patch.
struct Patch {
    Channels gate, up, down;
    bool replaces;
};

// A patch's work on the tokens of one expert, in the three places where the expert's own work needs it.
class PatchedShare {
  public:
    // The products with gate and up of `tokens` rows of inputs.
    void first(const Path& path, const Patch& patch, int expert, int tokens, const float* const* x);
    // Applies them to one token's products with the rows begin ... begin + width - 1.
    void join(int token, int begin, int width, float* gate, float* up) const;
    // Takes the channels' activations [tokens, inner] as inputs to `down`; replaced ones are set to zero there.
    void choose(const Path& path, float* activations, int inner);
    // Adds the products with tiles first ... last - 1 of `down` to y[tokens, stride].
    void second(const Path& path, int first, int last, float* y, size_t stride) const;

  private:
    struct Products {
        const float* values = nullptr;  // [tokens, stride], beginning with the expert's first channel
        int stride = 0;
        Scratch memory;
        QuantizedRows inputs;
    };
    void multiply(const Path& path, const Channels& channels, const float* const* x, Products& products);
    void join(const Channels& channels, const Products& products, int token, int begin, int width, float* y) const;

    const Patch* patch_ = nullptr;
    int expert_ = 0, tokens_ = 0;
    Products gates_, ups_;
    Scratch chosen_memory_;
    QuantizedRows chosen_;
    Matrix down_{};  // the part of the patch's that has this expert's channels
};

}  // namespace moqa
