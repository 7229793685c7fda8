// What all optimizers share: the parameters, f32 moments of each, master weights (core/master.h) of bf16 ones,
// clipping by the global norm, and the state that a checkpoint keeps. A class of its own has its options, the
// number of its moments, and apply().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "core/parameter.h"
#include "core/random.h"
#include "optim/gradient_norm.h"

namespace llmc {

struct OptimizerOptions {
    float grad_clip = 1.0f;      // largest global gradient norm; <= 0: no clipping
    bool master_weights = true;  // for bf16 parameters; false: stochastic rounding instead
    std::uint64_t seed = 13371337;

    void validate() const;  // throws ArgumentError
};

class Optimizer {
  public:
    virtual ~Optimizer() = default;

    // An update: measure() and apply(). Queues the work and returns: nothing waits. A gradient whose norm is
    // not finite changes no parameter and no moment.
    void step(float lr);
    // Queues the global norm of the gradients as they are, and the factor that clips it.
    void measure();
    // Queues the update with the gradients that were measured, and counts it. Throws if none were measured since
    // the last update.
    void apply(float lr);
    // The global norm of the last measured gradients, before clipping. Waits.
    float norm() const { return norm_.value(); }

    // Updates made so far.
    std::int64_t step_count() const { return step_count_; }
    void set_step_count(std::int64_t count);
    // Draws the seeds of stochastic rounding.
    std::uint64_t rng_state() const { return rng_.state; }
    void set_rng_state(std::uint64_t state);

    // What is kept of a parameter, for checkpoints. master is empty without master weights.
    struct State {
        std::string name;
        std::vector<Tensor> moments;
        Tensor master;
    };
    const std::vector<State>& state() const { return state_; }
    std::int64_t bytes() const { return arena_.bytes() + norm_.bytes(); }
    const std::shared_ptr<Backend>& backend() const { return backend_; }

  protected:
    // moments: how many are kept of each parameter.
    Optimizer(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters,
              const OptimizerOptions& options, int moments);
    // What state() takes for each weight of a parameter of this dtype.
    static std::int64_t bytes_per_parameter(DType dtype, bool master_weights, int moments);

    // Queues the update; step_count() does not count it yet.
    virtual void update(float lr) = 0;

    Backend& ops() { return *backend_; }
    const std::vector<Parameter>& parameters() const { return parameters_; }
    const Tensor& clip_factor() const { return norm_.factor(); }
    // Of the next parameter's stochastic rounding.
    std::uint32_t next_seed() { return rng_.randint32(); }

  private:
    std::shared_ptr<Backend> backend_;
    std::vector<Parameter> parameters_;
    GradientNorm norm_;
    XorShift rng_;
    std::int64_t step_count_ = 0;
    bool measured_ = false;  // since the last update
    std::vector<State> state_;
    Arena arena_;  // after its slots: its destructor still writes to them
};

}  // namespace llmc
