// AdamW over a model's parameters (Loshchilov & Hutter 2019; bias-corrected, decoupled decay), with clipping
// by the global norm.
//
// A bf16 parameter's master weight costs 2 bytes, not 4: the f32 weight is split into the bf16 parameter,
// which is its upper half rounded to nearest (ties away from zero), and the signed 16-bit difference of the
// bit patterns. join_master gives back every bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "core/random.h"

namespace llmc {

inline float join_master(bf16 param, std::int16_t master) {
    const std::uint32_t u =
        (static_cast<std::uint32_t>(param.bits) << 16) + static_cast<std::uint32_t>(master);
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
inline void split_master(float weight, bf16& param, std::int16_t& master) {
    std::uint32_t u;
    std::memcpy(&u, &weight, sizeof u);
    param.bits = static_cast<std::uint16_t>((u + 0x8000u) >> 16);
    master = static_cast<std::int16_t>(
        static_cast<std::uint16_t>(u - (static_cast<std::uint32_t>(param.bits) << 16)));
}

// What the optimizer needs to know of a parameter tensor.
struct Parameter {
    std::string name;
    Tensor value, grad;
    bool decay;  // weight decay applies: matrices and embeddings, not biases and layernorms
};

struct AdamWOptions {
    float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.0f;
    float grad_clip = 1.0f;      // largest global gradient norm; <= 0: no clipping
    bool decay_all = false;      // decay every tensor, as llm.c's CPU program does
    bool master_weights = true;  // for bf16 parameters; false: stochastic rounding instead
    std::uint64_t seed = 13371337;
};

class AdamW {
  public:
    AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, AdamWOptions options);

    // Takes the gradients as they are; `step` counts from 0. Queues the work and returns: nothing waits. A
    // gradient whose norm is not finite changes no parameter and no moment.
    void step(float lr, std::int64_t step);
    // The two halves, for who must look at the norm before deciding: norm() is ready after measure().
    void measure();
    void apply(float lr, std::int64_t step);
    // The global norm of the last measured gradients, before clipping. Waits.
    float norm() const;

    // Moments and masters by parameter, for checkpoints. master is empty without master weights.
    struct State {
        std::string name;
        Tensor m, v, master;
    };
    std::vector<State> state() const;
    std::int64_t bytes() const { return arena_.bytes(); }
    Backend& backend() const { return *backend_; }
    AdamWOptions& options() { return options_; }
    XorShift rng;  // seeds of stochastic rounding

  private:
    std::shared_ptr<Backend> backend_;
    std::vector<Parameter> parameters_;
    AdamWOptions options_;
    std::vector<Tensor> m_, v_, master_;
    Arena arena_;  // after its slots: its destructor still writes to them
    Tensor norm_squared_, norm_, factor_;
};

}  // namespace llmc
