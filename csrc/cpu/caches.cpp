#include "cpu/caches.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace llmc {

CacheSizes cache_sizes() {
    CacheSizes sizes{32 << 10, 512 << 10, 8 << 20};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const auto told = [](int name, std::int64_t& size) {
        const long value = sysconf(name);
        if (value > 0) size = value;
    };
    told(_SC_LEVEL1_DCACHE_SIZE, sizes.l1);
    told(_SC_LEVEL2_CACHE_SIZE, sizes.l2);
    told(_SC_LEVEL3_CACHE_SIZE, sizes.l3);
#endif
    return sizes;
}

}  // namespace llmc
