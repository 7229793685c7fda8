// GPT-2 and GPT-3: configuration, tables of parameters and activations, and the only schedule of forward and
// backward. gpt2.cpp is the file to read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "core/comm.h"
#include "core/optimizer.h"

namespace llmc {

struct GPT2Config {
    std::int64_t max_seq_len = 1024;
    std::int64_t vocab_size = 50257;
    std::int64_t num_layers = 12;
    std::int64_t num_heads = 12;
    std::int64_t channels = 768;

    // Rows of wte: the vocabulary rounded up to a multiple of 128. The rows past vocab_size stay zero: their
    // logits are left out of the softmax, so nothing is learned for them and they are never sampled.
    std::int64_t padded_vocab_size = 50304;

    void validate() const;  // throws ArgumentError
    bool operator==(const GPT2Config&) const = default;
};

inline std::int64_t padded_vocab(std::int64_t vocab_size) { return (vocab_size + 127) / 128 * 128; }

// llm.c's descriptors: "d12" or "gpt2:d12" (depth; max_seq_len 1024), "gpt3:c768" (channels; max_seq_len
// 2048).
GPT2Config gpt2_config_from_descriptor(const std::string& descriptor);

// What backward keeps and what it computes again. llm.c's -r.
enum class Recompute : int { nothing = 0, gelu = 1, gelu_and_layernorm = 2 };

// One tensor for each of llm.c's 16 parameter tensors, in file order. L leading where there is one per layer.
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

// Bytes by purpose, before anything is allocated.
struct MemoryPlan {
    std::int64_t parameters, gradients, optimizer, activations;
    std::int64_t total() const { return parameters + gradients + optimizer + activations; }
};

// The keys and values of the positions seen so far, for generation.
class KVCache;

class GPT2 {
  public:
    // dtype: of parameters and activations; grad_dtype: of parameter gradients.
    GPT2(std::shared_ptr<Backend> backend, const GPT2Config& config, DType dtype, DType grad_dtype);

    const GPT2Config& config() const { return config_; }
    DType dtype() const { return dtype_; }
    DType grad_dtype() const { return grad_dtype_; }
    const std::shared_ptr<Backend>& backend() const { return backend_; }
    std::int64_t num_parameters() const { return param_arena_.bytes() / size_of(dtype_); }

    // Random weights: normal(0, 0.02), projections into the residual stream by 1/sqrt(2L) smaller (Radford et
    // al. 2019), biases 0. Draws in the order of llm.c, which is PyTorch's module order.
    void init_weights(std::uint32_t seed = 42);

    Recompute recompute = Recompute::gelu;
    // Rows of logits that exist at a time.
    std::int64_t classifier_rows = 1024;

    // inputs (B, T) in host memory. Computes everything up to the final layernorm.
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T) { forward(inputs, B, T, true); }
    // The classifier and the backward pass of the last forward(). Adds scale * d(mean loss) to the
    // parameters' gradients and scale * mean loss to loss(). With comm, which belongs to an update's last
    // micro-step, both are then summed over its ranks: each layer's gradients set out when they are complete,
    // and travel while the layers below are computed.
    void backward(const std::int32_t* targets, float scale = 1.0f, Comm* comm = nullptr);
    void zero_grad();
    // The sum of scale * mean loss over the backward() calls since zero_grad(). Waits.
    float loss() const;
    // Forward only, in as much memory as one layer needs: mean loss over all targets. losses, if wanted: (B,
    // T) by token.
    float evaluate(const std::int32_t* inputs, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                   float* losses = nullptr);
    // (B, T, vocab_size) in host memory.
    void logits(const std::int32_t* inputs, std::int64_t B, std::int64_t T, float* out);

    // Generation. Appends tokens (count, of one sequence `b` of the cache) or one token to every sequence,
    // and gives the logits after the last one: (vocab_size), or (cache.B, vocab_size).
    void prefill(KVCache& cache, std::int64_t b, const std::int32_t* tokens, std::int64_t count,
                 float* logits);
    void decode(KVCache& cache, const std::int32_t* tokens, float* logits);
    // The same, but the logits stay on the device, where Backend::sample chooses a token for each sequence.
    // queue_tokens does not wait; without `tokens` it goes on from those chosen last, so that a step may be
    // queued before the one before it is read. read_tokens waits for the oldest step that was not read yet, two
    // at most: out (cache.B) are tokens or faults (core/sampler.h).
    void queue_tokens(KVCache& cache, const std::int32_t* tokens, const float* coins,
                      const SamplerOptions& options);
    void read_tokens(KVCache& cache, std::int32_t* out);

    // By name, in file order. Gradients are allocated on first use.
    std::vector<Parameter> parameters();
    std::vector<std::pair<std::string, Tensor>> parameter_tensors() const;
    // Turns the gradients that zero_grad() only marked into zeros, for who wants to look at them.
    void materialize_gradients();
    const GPT2Tensors& params() const { return params_; }
    const GPT2Activations& activations() const { return acts_; }
    Tensor all_parameters() const { return param_arena_.whole(dtype_); }
    // Call after writing parameters from outside: packed copies of them are dropped.
    void weights_changed() { backend_->weights_changed(all_parameters()); }

    static MemoryPlan memory_plan(const GPT2Config& config, DType dtype, DType grad_dtype, std::int64_t B,
                                  std::int64_t T, Recompute recompute, std::int64_t classifier_rows,
                                  bool training, bool master_weights);

  private:
    static void declare_parameters(Arena& arena, GPT2Tensors& t, const GPT2Config& config, DType dtype);
    static void declare_activations(Arena& arena, GPT2Activations& a, const GPT2Config& config, DType dtype,
                                    std::int64_t B, std::int64_t T, Recompute recompute,
                                    std::int64_t classifier_rows, bool training);
    void forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training);
    void check_tokens(const std::int32_t* tokens, std::int64_t n, std::int64_t least) const;
    void require_gradients();
    void run_cached(KVCache& cache, std::int64_t b, std::int64_t count, const std::int32_t* tokens,
                    std::int64_t T,                 // without tokens: those that k.tokens_ holds
                    const float* coins = nullptr);  // for k.coins_
    void cached_logits(KVCache& cache, float* out);

    std::shared_ptr<Backend> backend_;
    GPT2Config config_;
    DType dtype_, grad_dtype_;
    Arena param_arena_, grad_arena_, act_arena_, scalar_arena_;
    GPT2Tensors params_, grads_;
    GPT2Activations acts_;
    Tensor mean_loss_;
    std::int64_t B_ = 0, T_ = 0;
    bool training_ = false;                 // the activations are laid out for backward
    bool forward_done_ = false;             // and hold a forward pass
    bool grads_fresh_ = true;               // the next backward overwrites instead of adding
    Recompute laid_out_ = Recompute::gelu;  // for which the activations are laid out
};

class KVCache {
  public:
    KVCache(const GPT2& model, std::int64_t B, std::int64_t max_len);
    std::int64_t B() const { return B_; }
    std::int64_t max_len() const { return max_len_; }
    std::int64_t length(std::int64_t b) const { return lengths_[index(b)]; }
    void clear(std::int64_t b) { lengths_[index(b)] = 0; }
    std::int64_t bytes() const { return arena_.bytes(); }

  private:
    friend class GPT2;
    std::size_t index(std::int64_t b) const {
        LLMC_CHECK(b >= 0 && b < B_, "sequence {} of {}", b, B_);
        return static_cast<std::size_t>(b);
    }
    std::shared_ptr<Backend> backend_;
    std::int64_t B_, max_len_;
    std::vector<std::int32_t> lengths_;
    Arena arena_, work_;
    Tensor kcache_, vcache_;  // (L, B, NH, max_len, HS)
    Tensor numbers_;          // (2, sequences) i32, one copy from the host: start_ and the bits of coins_
    Tensor start_, coins_;
    Tensor tokens_, x_, ln_, mean_, rstd_, qkv_, branch_, fch_, fch_gelu_, residual_, logits_;
    std::vector<std::int32_t> host_numbers_;
    std::vector<float> host_logits_;  // padded rows
    bool chosen_ = false;             // tokens_ are those that the last queue_tokens chose
    std::unique_ptr<Readback> readbacks_[2];
    std::int64_t queued_ = 0, read_ = 0;
};

}  // namespace llmc
