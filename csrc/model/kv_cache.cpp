#include "model/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace llmc {

KVCache::KVCache(const Model& model, std::int64_t B, std::int64_t max_len)
    : model_(model), backend_(model.backend()), B_(B), max_len_(max_len),
      arena_("the activations of generation", 256) {
    LLMC_CHECK(B > 0 && B <= 1 << 24, "B is {}, expected 1 to {}", B, 1 << 24);
    LLMC_CHECK(max_len > 0 && max_len <= model.max_seq_len(),
               "max_len is {}, but the model's max_seq_len is {}", max_len, model.max_seq_len());
    lengths_.assign(static_cast<std::size_t>(B), 0);
    decoder_ = model.make_decoder(B, max_len);
}

// T new tokens for each of the sequences [b, b + count); logits of the last token of each, on the device. T > 1
// only with count 1.
void KVCache::run(std::int64_t b, std::int64_t count, const std::int32_t* tokens, std::int64_t T,
                  const float* coins, const SamplerOptions* sampler) {
    if (tokens) check_tokens(tokens, count * T, model_.vocab_size());
    for (std::int64_t i = b; i < b + count; ++i)
        LLMC_CHECK(length(i) + T <= max_len_,
                   "sequence {} has {} positions and gets {}, but the cache holds {}", i, length(i), T,
                   max_len_);
    const Tensor weight = model_.classifier().weight;
    arena_.clear();
    arena_.add(tokens_, "tokens", DType::i32, {count, T});
    arena_.add(numbers_, "numbers", DType::i32, {2, count});
    arena_.add(logits_, "logits", DType::f32, {count, weight.shape[0]});
    arena_.allocate(backend_);
    start_ = numbers_[0];
    coins_ = Tensor(numbers_[1].data, DType::f32, {count});
    host_numbers_.assign(static_cast<std::size_t>(2 * count), 0);
    std::copy_n(lengths_.data() + b, count, host_numbers_.data());
    if (coins)
        std::memcpy(host_numbers_.data() + count, coins, static_cast<std::size_t>(count) * sizeof(float));

    Backend& ops = *backend_;
    chosen_ = false;
    if (tokens) ops.from_host(tokens_, tokens);  // else they lie there
    ops.from_host(numbers_, host_numbers_.data());
    const auto step = [&] {
        const Tensor lnf = decoder_->decode(b, tokens_, start_);
        const Tensor last =
            lnf.view({count * T, lnf.cols()}).slice((T - 1) * count, count * T);  // T == 1, or one sequence
        ops.matmul_forward(logits_, last, weight, Tensor());
        if (sampler) ops.sample(tokens_.view({count}), logits_, coins_, model_.vocab_size(), *sampler);
    };
    // A token for every sequence comes again and again. The lengths are on the device, in start_.
    const SamplerOptions o = sampler ? *sampler : SamplerOptions();
    if (count == B_ && T == 1)
        ops.repeat(
            steps_[sampler ? 1 : 0], Phase::generation,
            {std::bit_cast<std::int32_t>(o.temperature), o.top_k, std::bit_cast<std::int32_t>(o.top_p)},
            step);
    else
        step();
    for (std::int64_t i = b; i < b + count; ++i)
        lengths_[static_cast<std::size_t>(i)] += static_cast<std::int32_t>(T);
}

void KVCache::copy_logits(float* out) {
    const std::int64_t V = model_.vocab_size(), Vp = logits_.cols();
    host_logits_.resize(static_cast<std::size_t>(logits_.numel()));
    backend_->to_host(host_logits_.data(), logits_);
    for (std::int64_t i = 0; i < logits_.rows(); ++i)
        std::copy_n(host_logits_.data() + i * Vp, V, out + i * V);
}

void KVCache::prefill(std::int64_t b, const std::int32_t* tokens, std::int64_t count, float* logits) {
    LLMC_CHECK(b >= 0 && b < B_, "sequence {} of {}", b, B_);
    LLMC_CHECK(count > 0, "no tokens to put into the cache");
    run(b, 1, tokens, count);
    copy_logits(logits);
}

void KVCache::decode(const std::int32_t* tokens, float* logits) {
    run(0, B_, tokens, 1);
    copy_logits(logits);
}

void KVCache::queue_tokens(const std::int32_t* tokens, const float* coins, const SamplerOptions& options) {
    check_sampler(model_.vocab_size(), options);
    LLMC_CHECK(tokens || chosen_, "no tokens to go on from: the cache was used for something else");
    LLMC_CHECK(queued_ - read_ < 2, "two steps are queued already: read_tokens() comes first");
    run(0, B_, tokens, 1, coins, &options);
    const Tensor chosen = tokens_.view({B_});
    std::unique_ptr<Readback>& readback = readbacks_[queued_ % 2];
    if (!readback) readback = backend_->make_readback(static_cast<std::size_t>(chosen.bytes()));
    readback->queue(chosen);
    chosen_ = true;
    ++queued_;
}

void KVCache::read_tokens(std::int32_t* out) {
    LLMC_CHECK(queued_ > read_, "no step is queued");
    readbacks_[read_ % 2]->wait(out);
    ++read_;
}

}  // namespace llmc
