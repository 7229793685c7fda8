// Stable sort of (key, value) pairs on the device. sort.cu does it with cub; the emulated build has its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmc {

// Bits that tell keys 0..largest apart.
inline int sort_bits(std::int64_t largest) {
    int bits = 1;
    while (largest >> bits) ++bits;
    return bits;
}

std::int64_t sort_scratch(std::int64_t n, int bits);
void sort_pairs(std::int32_t* keys, std::int32_t* values, const std::int32_t* keys_in,
                const std::int32_t* values_in, std::int64_t n, int bits, void* scratch, cudaStream_t stream);

}  // namespace llmc
