// The data caches, by whose sizes matmuls are cut into blocks (simd/gemm.h). They change no bit of a result.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace llmc {

struct Cache {
    std::int64_t bytes = 0;      // 0: there is none, or nobody tells
    std::int64_t shared_by = 1;  // CPUs, of those that this process may run on
};

struct Caches {
    Cache l1, l2, l3;
};

// What the system tells of the CPU with the smallest caches. LLMC_CACHES=32K,512K,16M overrides it with what one thread
// has to itself, for tests and measurements; throws ArgumentError if that is not three sizes.
Caches caches();

// What a Linux kernel tells of a CPU, in the files below /sys/devices/system/cpu. allowed(i): whether the process may run on CPU i.
Caches caches_in(const std::string& directory, int cpu, const std::function<bool(int)>& allowed);

// What a thread may count on, if all CPUs have one. Never 0: if nothing is known, it is what most CPUs have.
std::int64_t l2_share(const Caches& caches);
std::int64_t l3_share(const Caches& caches);  // without an L3, that of L2

}  // namespace llmc
