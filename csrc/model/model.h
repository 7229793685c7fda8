// Model: what every family offers, and what is the same in all of them: parameters and gradients after the
// family's table, and the classifier, which walks over chunks of rows. A family adds the schedule of forward and
// backward, up to the final layernorm and from it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/arrivals.h"
#include "comm/gradient_sink.h"
#include "core/arena.h"
#include "core/backend.h"
#include "core/parameter.h"
#include "model/decoder.h"
#include "model/options.h"
#include "model/parameters.h"

namespace llmc {

// A negative target is ignored, whichever it is.
constexpr std::int64_t kAnyNegative = std::int64_t{-1} << 31;
// Throws ArgumentError unless all n tokens are below vocab_size, and none is below `lowest`.
void check_tokens(const std::int32_t* tokens, std::int64_t n, std::int64_t vocab_size,
                  std::int64_t lowest = 0);

// The matrix that makes logits of the final layernorm's output, and the activations around it, which exist
// after a forward().
struct Classifier {
    Tensor weight;   // (Vp, C)
    Tensor lnf;      // (B, T, C)
    Tensor targets;  // (B, T) i32
    Tensor logits;   // (rows of a chunk, Vp)
    Tensor losses;   // (B, T) f32
};

class Model {
  public:
    virtual ~Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    const ModelOptions& options() const { return options_; }
    DType dtype() const { return options_.dtype; }
    DType grad_dtype() const { return options_.grad_dtype; }
    const std::shared_ptr<Backend>& backend() const { return backend_; }
    std::int64_t num_parameters() const { return count_parameters(table_); }
    virtual std::int64_t vocab_size() const = 0;
    virtual std::int64_t max_seq_len() const = 0;

    // ---- the schedule ----

    // inputs (B, T) in host memory. Computes everything up to the final layernorm.
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T) { forward(inputs, B, T, true); }
    // The classifier and the backward pass of the last forward(). Adds scale * d(mean loss) to the
    // parameters' gradients and scale * mean loss to loss(). A sink, which belongs to an update's last
    // micro-step, hears of each layer's gradients when they are complete, and of the loss.
    virtual void backward(const std::int32_t* targets, float scale = 1.0f, GradientSink* sink = nullptr) = 0;
    // The targets that backward() takes, of the shape of the last forward()'s inputs: (B, T).
    Tensor targets() const { return classifier().targets; }
    // Forward only, in as much memory as one layer needs: mean loss over all targets. losses, if wanted: (B,
    // T) by token.
    float evaluate(const std::int32_t* inputs, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                   float* losses = nullptr);
    // (B, T, vocab_size) in host memory.
    void logits(const std::int32_t* inputs, std::int64_t B, std::int64_t T, float* out);
    virtual Classifier classifier() const = 0;
    // What forward() has left for backward(), by name, in the order in which it is computed. The next forward() writes
    // into the same memory, or leaves it to whoever holds activation_memory(). Throws Error if there is none.
    virtual std::vector<std::pair<std::string, Tensor>> activations() const = 0;
    virtual std::shared_ptr<void> activation_memory() const = 0;
    // For a KVCache of B sequences of max_len positions. The model must outlive it.
    virtual std::unique_ptr<Decoder> make_decoder(std::int64_t B, std::int64_t max_len) const = 0;

    // ---- parameters and gradients ----

    // Random weights, as the table of parameters says.
    void init_weights(std::uint32_t seed = 42);
    void zero_grad();
    // The sum of scale * mean loss over the backward() calls since zero_grad(). Waits. Throws Error if there was none.
    float loss() const;
    // By name, in file order. Gradients are allocated on first use.
    std::vector<Parameter> parameters();
    // Weights that an optimizer among ranks has sent on their way. forward() waits for them by itself; whoever looks
    // at parameters otherwise waits first.
    const std::shared_ptr<Arrivals>& arrivals() const { return arrivals_; }
    std::vector<std::pair<std::string, Tensor>> parameter_tensors() const;
    // Turns the gradients that zero_grad() only marked into zeros, for a caller that looks at them.
    void materialize_gradients();
    Tensor all_parameters() const { return param_arena_.whole(dtype()); }
    // Call after writing parameters from outside: packed copies of them are dropped.
    void weights_changed() { backend_->weights_changed(all_parameters()); }

  protected:
    Model(ParameterTable table, std::shared_ptr<Backend> backend, const ModelOptions& options);

    // Without `training` no backward() may follow, so one layer's activations suffice for all.
    virtual void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training) = 0;
    // The classifier's part of backward(): the losses' mean, and the gradients of lnf and of the matrix. dlnf is
    // overwritten, dweight too unless `add`. The targets are on the device already.
    void classifier_backward(const Tensor& dlnf, const Tensor& dweight, float scale, bool add);

    const ParameterTable& table() const { return table_; }
    const std::vector<Tensor>& values() const { return values_; }  // in the order of the table
    // Allocates the gradients if they are not there yet.
    const std::vector<Tensor>& gradients();
    // Whether backward() adds to gradients; false once after zero_grad(), when it overwrites them.
    // Throws if an earlier backward() failed half-way: what it left in the gradients must not be added to.
    bool begin_adding();
    // Gradients are whole again.
    void end_adding() { grads_complete_ = true; }
    // backward() has come to its end.
    void end_backward() {
        end_adding();
        has_loss_ = true;
    }
    // Gradients of one micro-batch by itself, for backends that add micro-batches as ranks do.
    bool adds_whole_micro_batches() const;
    const std::vector<Tensor>& micro_gradients();
    // The gradients of a unit (comm/arrivals.h) are complete: those in micro_gradients() are added if `micro`, and the
    // sink, if there is one, may have the sums.
    void complete(std::int64_t unit, bool micro, GradientSink* sink);
    const Tensor& mean_loss() const { return mean_loss_; }

  private:
    // The unit of parameter i's first layer.
    std::int64_t first_unit(std::size_t i) const;
    std::vector<Tensor> of_unit(const std::vector<Tensor>& tensors, std::int64_t unit) const;

    std::shared_ptr<Backend> backend_;
    ModelOptions options_;
    ParameterTable table_;
    std::vector<Tensor> values_, gradients_, micro_gradients_;
    Tensor mean_loss_;
    Arena param_arena_, grad_arena_, micro_arena_,
        scalar_arena_;  // after their slots: their destructors still write to them
    std::shared_ptr<Arrivals> arrivals_ = std::make_shared<Arrivals>();
    bool grads_fresh_ = true;     // zero_grad() was called, and no backward() since
    bool grads_complete_ = true;  // no backward() failed half-way since then
    bool has_loss_ = false;       // a backward() came to its end since then
};

}  // namespace llmc
