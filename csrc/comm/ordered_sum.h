// The sum over ranks that every CPU transport makes: element by element in the order of ranks, in f32, rounded once.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace llmc {

// out[k] = parts[0][k] + parts[1][k] + ... for k < n. `out` may be one of the parts.
template <class T>
void ordered_sum(T* out, const std::vector<const T*>& parts, std::int64_t n) {
    // Stays in the first-level cache while the ranks' parts are added to it.
    constexpr std::int64_t kChunk = 2048;
    float sum[kChunk];
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
        const std::int64_t count = n - begin < kChunk ? n - begin : kChunk;
        for (std::int64_t k = 0; k < count; ++k) sum[k] = to_float(parts[0][begin + k]);
        for (std::size_t r = 1; r < parts.size(); ++r)
            for (std::int64_t k = 0; k < count; ++k) sum[k] += to_float(parts[r][begin + k]);
        for (std::int64_t k = 0; k < count; ++k) out[begin + k] = from_float<T>(sum[k]);
    }
}

}  // namespace llmc
