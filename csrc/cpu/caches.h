// The sizes of the data caches, by which matmuls are cut into blocks (simd/gemm.h). They change no bit of a result.
#pragma once

#include <cstdint>

namespace llmc {

struct CacheSizes {
    std::int64_t l1, l2, l3;  // bytes. l1 and l2 are one CPU's; all CPUs that share an l3 share it
};

// As the system tells, or, for what it does not tell, as most CPUs have. LLMC_CACHES=32K,512K,16M overrides them, for
// tests and measurements. Throws ArgumentError if that variable is not three sizes.
CacheSizes cache_sizes();

}  // namespace llmc
