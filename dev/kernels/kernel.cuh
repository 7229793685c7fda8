// What a CUDA kernel of this folder needs beside CUDA itself. run.py compiles each version into a library of its own: with nvcc, or
// with a C++ compiler over dev/cuda_emulation, where it first turns `kernel<<<grid, block>>>(...)` and `__shared__` into calls of the
// emulation. The functions at the end are for run.py: memory of the device, and a stopwatch.
#pragma once

#include <cstdint>
#include <cstdio>

#include <cuda_runtime.h>

#include "cuda/ptx.cuh"  // instructions that CUDA C++ has no name for: tensor cores, asynchronous copies

// Before the function `run` of a version: makes it visible to run.py, under this name.
#if defined(_WIN32)
#define KERNEL extern "C" __declspec(dllexport)
#else
#define KERNEL extern "C" __attribute__((visibility("default")))
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class A, class B>
__host__ __device__ constexpr std::int64_t ceil_div(A a, B b) {
    return (static_cast<std::int64_t>(a) + b - 1) / b;
}

// bf16 is the upper half of a float: 8 bits of exponent, 7 of mantissa.
struct bf16 {
    std::uint16_t bits;
};
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ bf16 to_bf16(float x) { return {llmc::ptx::bf16_bits(x)}; }

// Eight bf16 in the widest access that there is, 16 bytes.
struct alignas(16) bf16x8 {
    bf16 v[8];
};

// ---- the host's side ----

// What went wrong first; run.py asks after each call.
inline char first_error[256];
inline void note_error(const char* what) {
    if (!first_error[0]) std::snprintf(first_error, sizeof first_error, "%s", what);
}
inline bool ok(cudaError_t error) {
    if (error != cudaSuccess) note_error(cudaGetErrorString(error));
    return error == cudaSuccess;
}

#if defined(LLMC_CUDA_EMULATION)

// What kernels of this folder use and csrc/cuda does not.
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}
template <class T>
inline void __stcs(T* p, T x) {
    *p = x;
}
inline float atomicAdd(float* p, float x) {
    const float before = *p;
    *p += x;
    return before;
}
template <class T>
inline T __shfl_down_sync(unsigned, T value, int distance) {
    const int from = cuda_emulation::lane() + distance;
    return cuda_emulation::from_lane(value, from < kWarp ? from : cuda_emulation::lane());
}

inline cudaStream_t the_stream() {
    static const cudaStream_t stream = [] {
        cudaStream_t s;
        cudaStreamCreateWithFlags(&s, 0);
        return s;
    }();
    return stream;
}
// kernel<<<grid, block, shared>>>(arguments...), which are evaluated now, as on a GPU.
template <class Call>
auto emulated_launch(dim3 grid, dim3 block, std::size_t shared, Call call) {
    return [=](auto... arguments) {
        try {
            cuda_emulation::launch(the_stream(), grid, block, shared, [=] { call(arguments...); });
        } catch (const std::exception& e) {
            note_error(e.what());
        }
    };
}
#else
inline cudaStream_t the_stream() { return nullptr; }  // the one that <<<>>> takes if none is named
#endif

// Lets a kernel be launched with more than 48 KiB of dynamic shared memory, which a GPU gives only if it is asked.
template <class Kernel>
void allow_shared(Kernel* kernel, std::size_t bytes) {
#if defined(LLMC_CUDA_EMULATION)
    (void)kernel, (void)bytes;
#else
    ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
#endif
}

// Sets memory to zero, in the order of the launches around it.
inline void zero(void* p, std::size_t bytes) { ok(cudaMemsetAsync(p, 0, bytes, the_stream())); }

// Memory for what one kernel hands to the next. It stays until a call asks for more; SLOT tells several apart.
template <class T, int SLOT = 0>
T* scratch(std::int64_t count) {
    static void* memory = nullptr;
    static std::size_t size = 0;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > size) {
        ok(cudaFree(memory));
        size = ok(cudaMalloc(&memory, bytes)) ? bytes : 0;
    }
    return static_cast<T*>(memory);
}

// ---- for run.py ----

// On the emulated device kernels run when something waits for them, and errors of theirs are exceptions.
#if defined(LLMC_CUDA_EMULATION)
#define KERNEL_TRY(...)                                                                                      \
    try {                                                                                                    \
        __VA_ARGS__;                                                                                         \
    } catch (const std::exception& e) {                                                                      \
        note_error(e.what());                                                                                \
    }
#else
#define KERNEL_TRY(...) __VA_ARGS__
#endif

KERNEL const char* error_of_device() { return first_error; }

KERNEL void* device_malloc(std::int64_t bytes) {
    void* p = nullptr;
    KERNEL_TRY(ok(cudaMalloc(&p, static_cast<std::size_t>(bytes))));
    return p;
}
KERNEL void device_free(void* p) { KERNEL_TRY(ok(cudaFree(p))); }

KERNEL void copy_to_device(void* device, const void* host, std::int64_t bytes) {
    KERNEL_TRY(ok(cudaMemcpyAsync(device, host, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice,
                                  the_stream()));
               ok(cudaStreamSynchronize(the_stream())));
}
// Waits for all kernels before.
KERNEL void copy_to_host(void* host, const void* device, std::int64_t bytes) {
    KERNEL_TRY(ok(cudaGetLastError()); ok(cudaMemcpyAsync(host, device, static_cast<std::size_t>(bytes),
                                                          cudaMemcpyDeviceToHost, the_stream()));
               ok(cudaStreamSynchronize(the_stream())));
}

KERNEL const char* device_name() {
    static char name[256];
    cudaDeviceProp p;
    if (ok(cudaGetDeviceProperties(&p, 0))) std::snprintf(name, sizeof name, "%s", p.name);
    return name;
}

// The stopwatch runs on the device, from one event to another. Between two measurements memory twice as large as the L2 cache is
// written, so that a kernel finds none of its operands there. While the device does that, the host gets ahead with the launches.
inline cudaEvent_t watch[2];

KERNEL void start_watch() {
#if !defined(LLMC_CUDA_EMULATION)
    static void* flush = nullptr;
    static std::size_t bytes = 0;
    if (!flush) {
        for (cudaEvent_t& event : watch) ok(cudaEventCreate(&event));
        cudaDeviceProp p;
        ok(cudaGetDeviceProperties(&p, 0));
        bytes = 2 * static_cast<std::size_t>(p.l2CacheSize);
        ok(cudaMalloc(&flush, bytes));
    }
    ok(cudaMemsetAsync(flush, 0, bytes, the_stream()));
    ok(cudaEventRecord(watch[0], the_stream()));
#endif
}
// Returns seconds.
KERNEL double stop_watch() {
    float milliseconds = 0.0f;
#if !defined(LLMC_CUDA_EMULATION)
    ok(cudaEventRecord(watch[1], the_stream()));
    ok(cudaEventSynchronize(watch[1]));
    ok(cudaEventElapsedTime(&milliseconds, watch[0], watch[1]));
    ok(cudaGetLastError());
#endif
    return milliseconds * 1e-3;
}

// The seconds in which the device copies so many bytes.
KERNEL double copy_seconds(std::int64_t bytes) {
    double seconds = 0.0;
#if !defined(LLMC_CUDA_EMULATION)
    void *from = nullptr, *to = nullptr;
    if (ok(cudaMalloc(&from, bytes)) && ok(cudaMalloc(&to, bytes))) {
        start_watch();
        ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, the_stream()));
        seconds = stop_watch();
    }
    ok(cudaFree(from));
    ok(cudaFree(to));
#else
    (void)bytes;
#endif
    return seconds;
}
