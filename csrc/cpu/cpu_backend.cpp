// Memory of the CPU backend, and its account of the machine.
#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <thread>

#include "cpu/isa.h"
#include "cpu/make_cpu.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace llmc {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

#if defined(_WIN32)
void* map_zeroed(std::size_t bytes) {
    return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
void unmap(void* p, std::size_t) { VirtualFree(p, 0, MEM_RELEASE); }
#else
void* map_zeroed(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    // Fewer TLB misses: 2 to 8 % on large products (doc/performance.md).
    if (bytes >= 2 * kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}
void unmap(void* p, std::size_t bytes) { munmap(p, bytes); }
#endif

// Pages come zeroed from the system and cost nothing until they are touched. A header page in front remembers
// the size.
constexpr std::size_t kHeader = 4096;

}  // namespace

std::shared_ptr<Backend> make_cpu(int threads) { return std::make_shared<CpuBackend>(threads); }

CpuBackend::CpuBackend(int threads)
    : kernels_(choose_isa().kernels), threads_(threads > 0 ? threads : default_threads()),
      scratch_(static_cast<std::size_t>(threads_)) {
    LLMC_CHECK(threads_ <= 1024, "threads is {}, expected at most 1024", threads_);
}

CpuBackend::~CpuBackend() {
    for (Scratch& s : scratch_) release(s.data);
    release(shared_.data);
}

DeviceInfo CpuBackend::info() const {
    DeviceInfo info;
    info.name = "cpu";
    info.isa = kernels_->isa;
    info.threads = threads_;
    info.pinning = pinning();
#if defined(__linux__)
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);)
        if (line.rfind("model name", 0) == 0) {
            info.description = line.substr(std::min(line.size(), line.find(':') + 2));
            break;
        }
#endif
#if defined(_WIN32)
    MEMORYSTATUSEX memory{};
    memory.dwLength = sizeof memory;
    if (GlobalMemoryStatusEx(&memory)) {
        info.total_bytes = static_cast<std::int64_t>(memory.ullTotalPhys);
        info.free_bytes = static_cast<std::int64_t>(memory.ullAvailPhys);
    }
#elif defined(_SC_PHYS_PAGES)
    info.total_bytes = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
#endif
    return info;
}

void* CpuBackend::allocate(std::size_t bytes) {
    const std::size_t mapped = bytes + kHeader;
    char* p = mapped < bytes ? nullptr : static_cast<char*>(map_zeroed(mapped));
    if (!p) throw Error(format("cpu: out of memory (allocating {} MB)", bytes >> 20));
    std::memcpy(p, &mapped, sizeof mapped);
    return p + kHeader;
}

void CpuBackend::release(void* memory) noexcept {
    if (!memory) return;
    char* p = static_cast<char*>(memory) - kHeader;
    std::size_t mapped;
    std::memcpy(&mapped, p, sizeof mapped);
    unmap(p, mapped);
}

void CpuBackend::grow(Scratch& scratch, std::int64_t bytes) {
    if (scratch.bytes >= bytes) return;
    release(scratch.data);
    scratch = {};
    scratch.data = allocate(static_cast<std::size_t>(bytes));
    scratch.bytes = bytes;
}

void CpuBackend::reserve_thread_scratch(std::int64_t bytes) {
    for (Scratch& s : scratch_) grow(s, bytes);
}

void* CpuBackend::shared_scratch(std::int64_t bytes) {
    grow(shared_, bytes);
    return shared_.data;
}

void CpuBackend::zero(Tensor x) {
    for_ranges(x.bytes(), 1 << 20, [&](std::int64_t begin, std::int64_t count) {
        std::memset(x.as<char>() + begin, 0, static_cast<std::size_t>(count));
    });
}

void CpuBackend::copy(Tensor out, Tensor inp) {
    LLMC_CHECK(out.numel() == inp.numel(), "copy: out is {}, inp is {}", out, inp);
    LLMC_CHECK(out.dtype == inp.dtype || (is_float(out.dtype) && is_float(inp.dtype)),
               "copy: cannot convert {} to {}", inp.dtype, out.dtype);
    for_ranges(out.numel(), kGrain, [&](std::int64_t i, std::int64_t n) {
        if (out.dtype == inp.dtype) {
            const std::int64_t size = size_of(out.dtype);
            std::memmove(out.as<char>() + i * size, inp.as<char>() + i * size,
                         static_cast<std::size_t>(n * size));
        } else if (out.dtype == DType::f32) {
            kernels<bf16>().to_f32(out.as<float>() + i, inp.as<bf16>() + i, n);
        } else {
            kernels<bf16>().from_f32(out.as<bf16>() + i, inp.as<float>() + i, n);
        }
    });
}

void CpuBackend::from_host(Tensor out, const void* host) {
    std::memcpy(out.data, host, static_cast<std::size_t>(out.bytes()));
}

void CpuBackend::to_host(void* host, Tensor inp) {
    std::memcpy(host, inp.data, static_cast<std::size_t>(inp.bytes()));
}

}  // namespace llmc
