// GPT-2 and GPT-3: tables of parameters and activations, and the only schedule of forward and backward.
// gpt2.cpp is the file to read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/gradient_sink.h"
#include "core/arena.h"
#include "core/backend.h"
#include "core/parameter.h"
#include "model/gpt2_config.h"
#include "model/options.h"

namespace llmc {

// A tensor for each parameter, in the order of gpt2_parameters(), which has the shapes.
struct GPT2Tensors {
    Tensor wte;       // (Vp, C)
    Tensor wpe;       // (maxT, C)
    Tensor ln1w;      // (L, C)
    Tensor ln1b;      // (L, C)
    Tensor qkvw;      // (L, 3C, C)
    Tensor qkvb;      // (L, 3C)
    Tensor attprojw;  // (L, C, C)
    Tensor attprojb;  // (L, C)
    Tensor ln2w;      // (L, C)
    Tensor ln2b;      // (L, C)
    Tensor fcw;       // (L, 4C, C)
    Tensor fcb;       // (L, 4C)
    Tensor fcprojw;   // (L, C, 4C)
    Tensor fcprojb;   // (L, C)
    Tensor lnfw;      // (C)
    Tensor lnfb;      // (C)
};

struct GPT2Activations {
    Tensor inputs, targets;          // (B, T) i32
    Tensor encoded;                  // (B, T, C)
    Tensor ln1, ln1_mean, ln1_rstd;  // (L, B, T, C), (L, B, T)
    Tensor qkv, atty, lse;           // (L, B, T, 3C), (L, B, T, C), (L, B, NH, T)
    Tensor residual2, ln2, ln2_mean, ln2_rstd;
    Tensor fch, fch_gelu;  // (L, B, T, 4C)
    Tensor residual3;
    Tensor lnf, lnf_mean, lnf_rstd;
    Tensor branch;                       // (B, T, C): what a block adds to the residual
    Tensor logits, losses;               // (rows of a chunk, Vp), (B, T)
    Tensor dresidual, dbranch, dhidden;  // gradients: (B, T, C), (B, T, C), (B, T, 4C)
};

class GPT2 {
  public:
    GPT2(const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options);

    const GPT2Config& config() const { return config_; }
    const ModelOptions& options() const { return options_; }
    DType dtype() const { return options_.dtype; }
    DType grad_dtype() const { return options_.grad_dtype; }
    const std::shared_ptr<Backend>& backend() const { return backend_; }
    std::int64_t num_parameters() const { return count_parameters(table_); }

    // Random weights, as the table of parameters says.
    void init_weights(std::uint32_t seed = 42);

    // inputs (B, T) in host memory. Computes everything up to the final layernorm.
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T) { forward(inputs, B, T, true); }
    // The classifier and the backward pass of the last forward(). Adds scale * d(mean loss) to the
    // parameters' gradients and scale * mean loss to loss(). A sink, which belongs to an update's last
    // micro-step, hears of each layer's gradients when they are complete, and of the loss.
    void backward(const std::int32_t* targets, float scale = 1.0f, GradientSink* sink = nullptr);
    void zero_grad();
    // The sum of scale * mean loss over the backward() calls since zero_grad(). Waits.
    float loss() const;
    // Forward only, in as much memory as one layer needs: mean loss over all targets. losses, if wanted: (B,
    // T) by token.
    float evaluate(const std::int32_t* inputs, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                   float* losses = nullptr);
    // (B, T, vocab_size) in host memory.
    void logits(const std::int32_t* inputs, std::int64_t B, std::int64_t T, float* out);

    // By name, in file order. Gradients are allocated on first use.
    std::vector<Parameter> parameters();
    std::vector<std::pair<std::string, Tensor>> parameter_tensors() const;
    // Turns the gradients that zero_grad() only marked into zeros, for a caller that looks at them.
    void materialize_gradients();
    const GPT2Tensors& params() const { return params_; }
    const GPT2Activations& activations() const { return acts_; }
    Tensor all_parameters() const { return param_arena_.whole(dtype()); }
    // Call after writing parameters from outside: packed copies of them are dropped.
    void weights_changed() { backend_->weights_changed(all_parameters()); }

    // master_weights: of the optimizer, whose memory is counted too if `training`.
    static MemoryPlan memory_plan(const GPT2Config& config, const ModelOptions& options, std::int64_t B,
                                  std::int64_t T, bool training, bool master_weights);

  private:
    static void declare_parameters(Arena& arena, GPT2Tensors& t, const ParameterTable& table, DType dtype);
    static void declare_activations(Arena& arena, GPT2Activations& a, const GPT2Config& config,
                                    const ModelOptions& options, std::int64_t B, std::int64_t T,
                                    bool training);
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training);
    void require_gradients();
    std::vector<Tensor> layer_gradients(std::int64_t l) const;

    std::shared_ptr<Backend> backend_;
    GPT2Config config_;
    ModelOptions options_;
    ParameterTable table_;
    Arena param_arena_, grad_arena_, act_arena_, scalar_arena_;
    GPT2Tensors params_, grads_;
    GPT2Activations acts_;
    Tensor mean_loss_;
    std::int64_t B_ = 0, T_ = 0;
    bool training_ = false;      // the activations are laid out for backward
    bool forward_done_ = false;  // and hold a forward pass
    bool grads_fresh_ = true;    // the next backward overwrites instead of adding
};

}  // namespace llmc
