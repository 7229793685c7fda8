// AdamW over a model's parameters (Loshchilov & Hutter 2019; bias-corrected, decoupled decay), with clipping
// by the global norm. Updates of bf16 parameters act on f32 master weights (optim/master.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "core/parameter.h"
#include "core/random.h"

namespace llmc {

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

    // An update: measure() and apply(). Queues the work and returns: nothing waits. A gradient whose norm is
    // not finite changes no parameter and no moment.
    void step(float lr);
    // Queues the global norm of the gradients as they are, and the factor that clips it.
    void measure();
    // Queues the update with the gradients that were measured, and counts it.
    void apply(float lr);
    // The global norm of the last measured gradients, before clipping. Waits.
    float norm() const;

    // Updates made so far, which the correction of the moments' bias goes by.
    std::int64_t step_count() const { return step_count_; }
    void set_step_count(std::int64_t count);
    // Draws the seeds of stochastic rounding.
    std::uint64_t rng_state() const { return rng_.state; }
    void set_rng_state(std::uint64_t state);

    // Moments and masters by parameter, for checkpoints. master is empty without master weights.
    struct State {
        std::string name;
        Tensor m, v, master;
    };
    std::vector<State> state() const;
    std::int64_t bytes() const { return arena_.bytes(); }
    const std::shared_ptr<Backend>& backend() const { return backend_; }

  private:
    std::shared_ptr<Backend> backend_;
    std::vector<Parameter> parameters_;
    AdamWOptions options_;
    XorShift rng_;
    std::int64_t step_count_ = 0;
    std::vector<Tensor> m_, v_, master_;
    Arena arena_;  // after its slots: its destructor still writes to them
    Tensor norm_squared_, norm_, factor_;
};

}  // namespace llmc
