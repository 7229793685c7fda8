// cuda/sort.h for the emulated device.
#include "cuda/sort.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace llmc {

std::int64_t sort_scratch(std::int64_t, int) { return 256; }

void sort_pairs(std::int32_t* keys, std::int32_t* values, const std::int32_t* keys_in,
                const std::int32_t* values_in, std::int64_t n, int bits, void*, cudaStream_t stream) {
    cuda_emulation::enqueue(stream, [=] {
        std::vector<std::int64_t> order(static_cast<std::size_t>(n));
        std::iota(order.begin(), order.end(), 0);
        const std::int32_t mask = static_cast<std::int32_t>((std::int64_t{1} << bits) - 1);
        std::stable_sort(order.begin(), order.end(),
                         [=](auto a, auto b) { return (keys_in[a] & mask) < (keys_in[b] & mask); });
        for (std::int64_t i = 0; i < n; ++i) keys[i] = keys_in[order[i]], values[i] = values_in[order[i]];
    });
}

}  // namespace llmc
