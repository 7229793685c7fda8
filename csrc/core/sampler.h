// Choosing the next token from one row of logits.
#pragma once

#include <cstdint>
#include <limits>

namespace llmc {

struct SamplerOptions {
    float temperature = 1.0f;  // 0: the most likely token
    std::int64_t top_k = 0;    // 0: no limit
    float top_p = 1.0f;        // nucleus sampling (Holtzman et al. 2020); 1: no limit
};

// coin in [0, 1). Walks the cumulative probabilities in the order of token ids, as llm.c does; top_k and
// top_p only remove tokens from the walk. Throws Error if a logit is NaN or the largest is infinite.
std::int64_t sample_token(const float* logits, std::int64_t V, const SamplerOptions& options, float coin);

void check_sampler(std::int64_t V, const SamplerOptions& options);  // throws ArgumentError

// sample_token in two steps, for a device that cannot throw: the first returns a token or a fault, the second
// returns the token or throws the fault as an Error.
// Faults: -1 - i if logit i is the first that is not a number, and the two below if the largest is infinite.
constexpr std::int32_t kLargestIsInfinite = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kLargestIsMinusInfinite = kLargestIsInfinite + 1;
std::int32_t token_or_fault(const float* logits, std::int64_t V, const SamplerOptions& options, float coin);
std::int32_t token_of(std::int32_t token_or_fault);

}  // namespace llmc
