// The data caches, by whose sizes matmuls are cut into blocks (simd/gemm.h). They change no bit of a result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llmc {

struct Cache {
    std::int64_t bytes = 0;      // 0: there is none, or nobody tells
    std::int64_t shared_by = 1;  // CPUs, of those that this process may run on
};

struct Caches {
    Cache l1, l2, l3;
};

// What the system tells; where CPUs differ, of the one of which a thread has the least. LLMC_CACHES=32K,512K,16M overrides it with
// what one thread has to itself, for tests and measurements; throws ArgumentError if that is not three sizes.
Caches caches();

// What a Linux kernel tells in the files below `directory`, /sys/devices/system/cpu, of the CPUs on which the process may run.
Caches caches_in(const std::string& directory, const std::vector<int>& allowed);

// What a thread may count on, if all CPUs have one. Never 0: if nothing is known, it is what most CPUs have.
std::int64_t l2_share(const Caches& caches);
std::int64_t l3_share(const Caches& caches);  // without an L3, that of L2

}  // namespace llmc
