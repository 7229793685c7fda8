// KVCache: generation for any family. The family's Decoder keeps the keys and values of the positions seen so far;
// here are the lengths of the sequences, the logits and the choice of tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "model/model.h"

namespace llmc {

class KVCache {
  public:
    // Room for B sequences of max_len positions. The model must outlive the cache.
    KVCache(const Model& model, std::int64_t B, std::int64_t max_len);
    std::int64_t B() const { return B_; }
    std::int64_t max_len() const { return max_len_; }
    std::int64_t length(std::int64_t b) const { return lengths_[index(b)]; }
    void clear(std::int64_t b) { lengths_[index(b)] = 0; }
    std::int64_t bytes() const { return decoder_->bytes(); }
    const std::shared_ptr<Backend>& backend() const { return backend_; }

    // Append tokens (count, of sequence b alone) or one token to every sequence, and give the logits after the
    // last one: (vocab_size), or (B, vocab_size).
    void prefill(std::int64_t b, const std::int32_t* tokens, std::int64_t count, float* logits);
    void decode(const std::int32_t* tokens, float* logits);
    // As decode(), but the logits stay on the device, where Backend::sample chooses a token for each sequence.
    // queue_tokens does not wait; without `tokens` it goes on from those chosen last, so that a step may be
    // queued before the one before it is read. read_tokens waits for the oldest step that was not read yet, two
    // at most: out (B) are tokens or faults (core/sampler.h).
    void queue_tokens(const std::int32_t* tokens, const float* coins, const SamplerOptions& options);
    void read_tokens(std::int32_t* out);

  private:
    void run(std::int64_t b, std::int64_t count, const std::int32_t* tokens,
             std::int64_t T,                            // without tokens: those that tokens_ holds
             const float* coins = nullptr,              // for coins_
             const SamplerOptions* sampler = nullptr);  // if new tokens are to be chosen
    void copy_logits(float* out);
    std::size_t index(std::int64_t b) const {
        LLMC_CHECK(b >= 0 && b < B_, "sequence {} of {}", b, B_);
        return static_cast<std::size_t>(b);
    }
    const Model& model_;
    std::shared_ptr<Backend> backend_;
    std::int64_t B_, max_len_;
    std::vector<std::int32_t> lengths_;
    std::unique_ptr<Decoder> decoder_;
    Tensor numbers_;  // (2, sequences) i32, one copy from the host: start_ and the bits of coins_
    Tensor start_, coins_;
    Tensor tokens_, logits_;
    Arena arena_;  // after its slots: its destructor still writes to them
    std::vector<std::int32_t> host_numbers_;
    std::vector<float> host_logits_;  // padded rows
    bool chosen_ = false;             // tokens_ are those that the last queue_tokens chose
    std::unique_ptr<Readback> readbacks_[2];
    std::unique_ptr<Recording> steps_[2];  // of a token for every sequence; [1] chooses the next ones
    std::int64_t queued_ = 0, read_ = 0;
};

}  // namespace llmc
