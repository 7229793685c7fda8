#include "core/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/check.h"

namespace llmc {

void check_sampler(std::int64_t V, const SamplerOptions& options) {
    LLMC_CHECK(V > 0, "the vocabulary is empty");
    LLMC_CHECK(V <= 1 << 30, "a vocabulary of {} tokens is too large", V);
    LLMC_CHECK(options.temperature >= 0.0f, "temperature is {}, expected 0 or more", options.temperature);
    LLMC_CHECK(options.top_k >= 0, "top_k is {}, expected 0 (no limit) or more", options.top_k);
    LLMC_CHECK(options.top_p > 0.0f && options.top_p <= 1.0f, "top_p is {}, expected in (0, 1]",
               options.top_p);
}

std::int32_t token_of(std::int32_t token_or_fault) {
    if (token_or_fault >= 0) return token_or_fault;
    if (token_or_fault == kLargestIsInfinite || token_or_fault == kLargestIsMinusInfinite)
        throw Error(filled("cannot sample: the largest logit is {}",
                           token_or_fault == kLargestIsInfinite ? HUGE_VALF : -HUGE_VALF));
    throw Error(filled("cannot sample: logit {} is not a number", -1 - token_or_fault));
}

std::int64_t sample_token(const float* logits, std::int64_t V, const SamplerOptions& options, float coin) {
    return token_of(token_or_fault(logits, V, options, coin));
}

std::int32_t token_or_fault(const float* logits, std::int64_t V, const SamplerOptions& options, float coin) {
    check_sampler(V, options);
    for (std::int64_t i = 0; i < V; ++i)
        if (std::isnan(logits[i])) return static_cast<std::int32_t>(-1 - i);
    const std::int64_t best = std::max_element(logits, logits + V) - logits;
    if (!std::isfinite(logits[best]))
        return logits[best] > 0.0f ? kLargestIsInfinite : kLargestIsMinusInfinite;
    if (options.temperature == 0.0f) return static_cast<std::int32_t>(best);

    std::vector<double> p(static_cast<std::size_t>(V));
    double total = 0.0;
    for (std::int64_t i = 0; i < V; ++i)
        total += p[i] = std::exp(static_cast<double>((logits[i] - logits[best]) / options.temperature));

    if ((options.top_k > 0 && options.top_k < V) || options.top_p < 1.0f) {
        std::vector<std::int64_t> order(static_cast<std::size_t>(V));
        std::iota(order.begin(), order.end(), std::int64_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](std::int64_t a, std::int64_t b) { return p[a] > p[b]; });
        const std::int64_t most = options.top_k > 0 ? std::min(options.top_k, V) : V;
        double kept = 0.0;
        for (std::int64_t i = 0; i < V; ++i) {
            double& q = p[static_cast<std::size_t>(order[i])];
            if (i >= most || (i > 0 && kept >= options.top_p * total))
                q = 0.0;
            else
                kept += q;
        }
        total = kept;
    }
    double below = 0.0;
    std::int64_t last = best;
    for (std::int64_t i = 0; i < V; ++i) {
        if (p[i] == 0.0) continue;
        below += p[i];
        last = i;
        if (coin * total < below) return static_cast<std::int32_t>(i);
    }
    return static_cast<std::int32_t>(last);  // only if rounding left coin * total no lower than the sum
}

}  // namespace llmc
