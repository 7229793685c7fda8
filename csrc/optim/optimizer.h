// What all optimizers share: the parameters, f32 moments of each, master weights (core/master.h) of bf16 ones,
// clipping by the global norm, and the state that a checkpoint keeps. A class of its own has its options, the
// number of its moments, and update_parts().
//
// Alone, an optimizer updates every parameter. Among ranks (ZeRO-1; Rajbhandari et al. 2020) it updates its rank's
// piece of each layer of each parameter, or all of the layer if that cannot be updated in pieces and the rank is its
// owner (comm/partition.h), and keeps state for that alone; the ranks then send each other the weights, which arrive
// while the next forward pass begins.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/arrivals.h"
#include "comm/comm.h"
#include "comm/partition.h"
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

// The ranks among which an optimizer's work is divided. Gradients have been reduce-scattered over `comm` by partition()
// when measure() is called; `arrivals` are those of the parameters' model.
struct Sharding {
    std::shared_ptr<Comm> comm;  // null: this process updates everything
    std::shared_ptr<Arrivals> arrivals;
};

class Optimizer {
  public:
    virtual ~Optimizer();
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;

    // An update: measure() and apply(). Queues the work and returns: nothing waits. A gradient whose norm is
    // not finite changes no parameter and no moment.
    void step(float lr);
    // Queues the global norm of the gradients as they are, and the factor that clips it.
    void measure();
    // Queues the update with the gradients that were measured, and counts it. Throws if none were measured since
    // the last update.
    void apply(float lr);
    // The global norm of the last measured gradients, before clipping. Waits. Throws Error if none were measured.
    float norm() const;

    // Updates made so far.
    std::int64_t step_count() const { return step_count_; }
    void set_step_count(std::int64_t count);
    // Draws the seeds of stochastic rounding.
    std::uint64_t rng_state() const { return rng_.state; }
    void set_rng_state(std::uint64_t state);

    // What is kept of a parameter: of each of its layers some elements, one layer's behind the other's. Without ranks
    // those are all elements. master is empty without master weights.
    struct Kept {
        Range piece;         // of the layer
        std::int64_t begin;  // where they are in moments and master
        Range range() const { return {begin, begin + piece.size()}; }
    };
    struct State {
        std::string name;
        std::vector<Tensor> moments;  // (the sum of the pieces' sizes)
        Tensor master;
        // On a rank that owns nothing of any parameter they have no memory, but a dtype.
        bool has_master() const { return master.dtype == DType::i16; }
        std::vector<Kept> layers;
        std::int64_t layer_numel;
    };
    const std::vector<State>& state() const { return state_; }

    // For checkpoints, which do not know of ranks: the whole of a moment, or of the master (kind = number of moments),
    // of one layer of a parameter, flat. Every rank calls these in the same order. The tensor is valid until the next
    // call; alone, it is the state itself.
    Tensor gather(std::size_t parameter, std::size_t kind, std::int64_t layer);
    // The way back. values: rank 0's, in host memory; the others' are not looked at.
    void scatter(std::size_t parameter, std::size_t kind, std::int64_t layer, const void* values);
    bool sharded() const { return partition_ != nullptr; }
    // Which rank updates what; null: this process updates everything.
    const std::shared_ptr<const Partition>& partition() const { return partition_; }
    virtual std::int64_t bytes() const { return arena_.bytes() + norm_.bytes(); }
    const std::shared_ptr<Backend>& backend() const { return backend_; }

  protected:
    // What an optimizer keeps of a parameter, and how it updates it.
    struct Treatment {
        int moments;
        bool whole = false;  // a layer cannot be updated in pieces, and has one owner among ranks
    };
    Optimizer(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters,
              const OptimizerOptions& options, Treatment (*treatment)(const Parameter&), Sharding sharding);
    // What state() takes for each weight of a parameter of this dtype.
    static std::int64_t bytes_per_parameter(DType dtype, bool master_weights, int moments);

    // A part of a parameter that this rank updates, and what is kept of it; all flat.
    struct Part {
        std::size_t parameter;  // its index
        std::int64_t first;     // the index in the parameter of the part's first element
        Tensor value, grad, master;
        std::vector<Tensor> moments;
    };
    // Called before the parts of an update.
    virtual void begin_update(float lr) = 0;
    // Queues the update of some parts. step_count() does not count it yet.
    virtual void update_parts(std::span<const Part> parts) = 0;

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
    bool has_norm_ = false;  // gradients were measured at some time
    Sharding sharding_;
    std::shared_ptr<const Partition> partition_;
    std::vector<State> state_;
    // What is updated and sent at a time: a unit of the model, or alone everything.
    struct Group {
        std::int64_t unit;
        std::vector<Part> parts;
        std::vector<Divided> values;  // layers of parameters, of which the ranks have updated what they own
    };
    void plan(std::size_t parameter);
    Group& group_of(std::int64_t unit);
    int owner(std::size_t parameter, std::int64_t layer) const;
    const Kept& kept(std::size_t parameter, std::int64_t layer) const;
    Tensor own_state(std::size_t parameter, std::size_t kind, std::int64_t layer) const;
    Tensor scratch(DType dtype, std::int64_t numel);

    std::vector<Group> groups_;
    std::vector<Tensor> measured_gradients_;  // by layer, this rank's pieces
    Arena arena_, scratch_arena_;             // after their slots: their destructors still write to them
    Tensor scratch_;                          // a whole layer of the largest parameter
};

}  // namespace llmc
