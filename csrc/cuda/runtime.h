// The CUDA runtime as host code sees it: every call checked, every failure one llmc::Error.
#pragma once

#include <cuda_runtime.h>

#include "core/check.h"

namespace llmc {

[[noreturn]] void throw_cuda_error(cudaError_t error, const char* call);
// True while what is queued in the stream becomes a part of a graph.
bool is_recorded(cudaStream_t stream);

// Where a kernel is launched. If `overlap`, it may begin while the kernel before it still runs, and calls
// overlap_kernels() before it reads what another kernel of the chain writes, or writes anything.
struct LaunchStream {
    cudaStream_t stream;
    bool overlap;
    LaunchStream(cudaStream_t stream, bool overlap = false) : stream(stream), overlap(overlap) {}
};

}  // namespace llmc

#define CUDA_CHECK(call)                                                                                     \
    do {                                                                                                     \
        const cudaError_t cuda_error_ = (call);                                                              \
        if (cuda_error_ != cudaSuccess) [[unlikely]]                                                         \
            ::llmc::throw_cuda_error(cuda_error_, #call);                                                    \
    } while (0)
