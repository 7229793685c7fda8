// Memory of the CPU backend, and its account of the machine.
#include "cpu/cpu_backend.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "core/dims.h"
#include "cpu/isa.h"
#include "cpu/make_cpu.h"
#include "cpu/memory.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace llmc {

std::shared_ptr<Backend> make_cpu(int threads) { return std::make_shared<CpuBackend>(threads); }

CpuBackend::CpuBackend(int threads)
    : kernels_(choose_isa().kernels), caches_(caches()), threads_(threads > 0 ? threads : default_threads()) {
    LLMC_CHECK(threads_ <= 1024, "threads is {}, expected at most 1024", threads_);
    scratch_.resize(static_cast<std::size_t>(threads_));
    if (kernels<bf16>().pack_weight) weights_ = std::make_unique<PackedWeights>();
}

CpuBackend::~CpuBackend() {
    for (Scratch& s : scratch_) release_pages(s.data);
    release_pages(shared_.data);
}

DeviceInfo CpuBackend::info() const {
    DeviceInfo info;
    info.name = "cpu";
    info.description = cpu_name();
    info.isa = kernels_->isa;
    info.bf16_arithmetic = kernels_->bf16_arithmetic;
    info.threads = threads_;
    info.pinning = pinning();
    info.l1_bytes = caches_.l1.bytes, info.l2_bytes = caches_.l2.bytes, info.l3_bytes = caches_.l3.bytes;
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

void* CpuBackend::allocate(std::size_t bytes) { return allocate_pages(bytes); }

void CpuBackend::release(void* memory) noexcept {
    if (memory && weights_) weights_->forget(memory, allocated_bytes(memory));
    release_pages(memory);
}

void CpuBackend::weights_changed(Tensor weights) {
    if (weights_) weights_->weights_changed(weights);
}

void CpuBackend::drop_packed_copies(Tensor memory) {
    if (weights_) weights_->drop_copies(memory);
}

void CpuBackend::grow(Scratch& scratch, std::int64_t bytes) {
    if (scratch.bytes >= bytes) return;
    release_pages(scratch.data);
    scratch = {};
    scratch.data = allocate_pages(static_cast<std::size_t>(bytes));
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
    zero_dims(x);
    drop_packed_copies(x);
    for_ranges(x.bytes(), 1 << 20, [&](std::int64_t begin, std::int64_t count) {
        std::memset(x.as<char>() + begin, 0, static_cast<std::size_t>(count));
    });
}

void CpuBackend::copy(Tensor out, Tensor inp) {
    copy_dims(out, inp);
    drop_packed_copies(out);
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
    host_copy_dims("from_host", out);
    drop_packed_copies(out);
    for_ranges(out.bytes(), 1 << 20, [&](std::int64_t begin, std::int64_t count) {
        std::memcpy(out.as<char>() + begin, static_cast<const char*>(host) + begin,
                    static_cast<std::size_t>(count));
    });
}

void CpuBackend::to_host(void* host, Tensor inp) {
    host_copy_dims("to_host", inp);
    for_ranges(inp.bytes(), 1 << 20, [&](std::int64_t begin, std::int64_t count) {
        std::memcpy(static_cast<char*>(host) + begin, inp.as<char>() + begin,
                    static_cast<std::size_t>(count));
    });
}

}  // namespace llmc
