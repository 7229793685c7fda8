// GPT-2 and GPT-3: parameters and activations by name, and the only schedule of forward and backward.
// gpt2.cpp is the file to read; gpt2_decoder.cpp has the schedule of generation.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "model/gpt2_config.h"
#include "model/model.h"

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

    GPT2Tensors() = default;
    GPT2Tensors(const ParameterTable& table, const std::vector<Tensor>& tensors);
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

class GPT2 final : public Model {
  public:
    GPT2(const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options);

    const GPT2Config& config() const { return config_; }
    std::int64_t vocab_size() const override { return config_.vocab_size; }
    std::int64_t max_seq_len() const override { return config_.max_seq_len; }
    void backward(const std::int32_t* targets, float scale = 1.0f, GradientSink* sink = nullptr) override;
    using Model::forward;
    Classifier classifier() const override {
        return {params_.wte, acts_.lnf, acts_.targets, acts_.logits, acts_.losses};
    }
    std::vector<std::pair<std::string, Tensor>> activations() const override;
    std::shared_ptr<void> activation_memory() const override { return act_arena_.memory(); }
    std::unique_ptr<Decoder> make_decoder(std::int64_t B, std::int64_t max_len) const override;

    const GPT2Tensors& params() const { return params_; }

    // optimizer_bytes: what the optimizer keeps, which is counted if `training`. micro_gradients:
    // whether an update has several micro-batches that are added as a whole (Model::adds_whole_micro_batches).
    static MemoryPlan memory_plan(const GPT2Config& config, const ModelOptions& options, std::int64_t B,
                                  std::int64_t T, bool training, std::int64_t optimizer_bytes,
                                  bool micro_gradients = false);

  private:
    static void declare_activations(Arena& arena, GPT2Activations& a, const GPT2Config& config,
                                    const ModelOptions& options, std::int64_t B, std::int64_t T,
                                    bool training);
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training) override;
    void queue_forward();
    // What becomes of a micro-batch's gradients: they are the first, each op adds its own, or they are added as a whole.
    enum class Adding { none, each, whole };
    void queue_backward(float scale, Adding adding, GradientSink* sink);

    GPT2Config config_;
    GPT2Tensors params_;
    GPT2Activations acts_;
    Arena act_arena_;  // after its slots: its destructor still writes to them
    std::int64_t B_ = 0, T_ = 0;
    bool activations_done_ = false;  // they hold a forward pass of all layers
    bool forward_done_ = false;      // and no backward() has begun since
    std::unique_ptr<Recording> recorded_forward_, recorded_backward_[3];  // by Adding
};

}  // namespace llmc
