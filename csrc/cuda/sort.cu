// cub's radix sort: stable, deterministic, as many passes as the keys have bits.
#include "cuda/sort.h"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/runtime.h"

namespace llmc {

std::int64_t sort_scratch(std::int64_t n, int bits) {
    std::size_t bytes = 0;
    const std::int32_t* const in = nullptr;
    std::int32_t* const out = nullptr;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, in, out, in, out, n, 0, bits));
    return static_cast<std::int64_t>(bytes);
}

void sort_pairs(std::int32_t* keys, std::int32_t* values, const std::int32_t* keys_in,
                const std::int32_t* values_in, std::int64_t n, int bits, void* scratch, cudaStream_t stream) {
    std::size_t bytes = static_cast<std::size_t>(sort_scratch(n, bits));
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys_in, keys, values_in, values, n, 0, bits,
                                               stream));
}

}  // namespace llmc
