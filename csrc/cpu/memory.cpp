#include "cpu/memory.h"

#include <cstdlib>
#include <cstring>

#include "core/check.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace llmc {

namespace {

#if defined(_WIN32)
void* map_zeroed(std::size_t bytes) {
    return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
void unmap(void* p, std::size_t) { VirtualFree(p, 0, MEM_RELEASE); }
#elif defined(__SANITIZE_ADDRESS__)
// From the heap, because AddressSanitizer watches the ends of what comes from there, and not those of pages.
void* map_zeroed(std::size_t bytes) {
    void* p = nullptr;
    return posix_memalign(&p, 4096, bytes) == 0 ? std::memset(p, 0, bytes) : nullptr;
}
void unmap(void* p, std::size_t) { std::free(p); }
#else
void* map_zeroed(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    // Fewer TLB misses: 2 to 8 % on large matmuls (doc/performance.md).
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    if (bytes >= 2 * kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}
void unmap(void* p, std::size_t bytes) { munmap(p, bytes); }
#endif

// A header page in front remembers the size.
constexpr std::size_t kHeader = 4096;

char* start_of(const void* memory) { return static_cast<char*>(const_cast<void*>(memory)) - kHeader; }

}  // namespace

void* allocate_pages(std::size_t bytes) {
    const std::size_t mapped = bytes + kHeader;
    char* p = mapped < bytes ? nullptr : static_cast<char*>(map_zeroed(mapped));
    if (!p) throw Error(filled("cpu: out of memory (allocating {} MB)", bytes >> 20));
    std::memcpy(p, &mapped, sizeof mapped);
    return p + kHeader;
}

std::size_t allocated_bytes(const void* memory) {
    std::size_t mapped;
    std::memcpy(&mapped, start_of(memory), sizeof mapped);
    return mapped - kHeader;
}

void release_pages(void* memory) noexcept {
    if (memory) unmap(start_of(memory), allocated_bytes(memory) + kHeader);
}

}  // namespace llmc
