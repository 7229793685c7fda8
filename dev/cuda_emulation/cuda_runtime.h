// CUDA on a CPU, for tests of csrc/cuda on machines without a GPU: g++ finds this header in the place of the
// toolkit's, so the kernels' own source is what runs. emulator.cpp says what is emulated.
//
// A thread of a block is a fiber; it runs until it meets a barrier or a warp collective, and which one runs
// next is drawn at random (LLMC_EMULATION_SEED): a missing barrier is a wrong result, not luck. Shared memory
// and fresh device memory hold NaNs. Streams defer their work until something waits for it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- the runtime API, as far as csrc/cuda uses it ----

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorCapturedEvent = 907,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrClockRate = 13 };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2;
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphExec_t = struct EmulatedGraphExec*;
struct cudaUUID_t {
    char bytes[16];
};
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    int major, minor, multiProcessorCount;
    std::size_t sharedMemPerBlockOptin, totalGlobalMem;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMalloc(void** p, std::size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, std::size_t bytes);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t s);
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t s);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaStreamQuery(cudaStream_t s);
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaEventQuery(cudaEvent_t e);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

// ---- device code ----

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_emulation {

void launch(cudaStream_t stream, dim3 grid, dim3 block, std::size_t shared, std::function<void()> thread);
// What the host does on a stream without a kernel (the stand-in for a library call).
void enqueue(cudaStream_t stream, std::function<void()> work);
// A stream as a shared library sees it, which has none of these functions: a cudaStream_t points to one. The work is asked
// again as long as it returns false, because it waits for another process.
class Queue {
  public:
    virtual void enqueue(std::function<bool()> work) = 0;

  protected:
    ~Queue() = default;
};
[[noreturn]] void fail(const char* what);

void sync_block();
// All 32 lanes of a warp give a value of at most 64 bytes; afterwards each may read all of them, at 64-byte
// steps, until its next collective.
constexpr int kSlot = 64;
const unsigned char* exchange(const void* value, std::size_t bytes);
int lane();

int new_shared_variable();
void* shared_variable(int id, std::size_t bytes);
unsigned char* dynamic_shared();

template <class T, class Unique>
T& shared_variable() {
    static const int id = new_shared_variable();
    return *static_cast<T*>(shared_variable(id, sizeof(T)));
}

// cp.async of `size` bytes, of which all but the first `bytes` are zeros. They arrive at the wait, and there are NaNs until
// then.
void async_copy(void* shared, const void* global, int size, int bytes);
void async_commit();
void async_wait(int pending_groups);

// wgmma. What a thread's cp.async wrote is NaNs for it until that thread's fence_async_proxy, and a barrier behind it.
void fence_async_proxy();
unsigned shared_address(const void* p);       // of dynamic shared memory
std::uint16_t shared_bf16(unsigned address);  // as wgmma sees it
// exchange() among 4 warps.
const unsigned char* exchange_in_group(const void* value, std::size_t bytes);
int thread_in_group();
void fence_registers();
// `compute` writes this thread's part of the product, now or, drawn at random, when it is waited for. Until then d is NaNs, and
// may not be written.
void start_matmul(float* d, int count, bool accumulate, std::function<void(float*)> compute);
void commit_matmuls();
void wait_matmuls(int pending_groups);

inline void check_aligned(const void* p, std::size_t alignment) {
    if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0) fail("a misaligned vector access");
}

template <class T>
T from_lane(T value, int source) {
    const unsigned char* const slots = exchange(&value, sizeof value);
    std::memcpy(&value, slots + source % 32 * kSlot, sizeof value);
    return value;
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::sync_block(); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p += x;
    return before;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
inline void __syncwarp() { cuda_emulation::exchange(nullptr, 0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_emulation::from_lane(value, cuda_emulation::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return cuda_emulation::from_lane(value, source);
}
inline int __any_sync(unsigned, bool value) {
    const unsigned char* const slots = cuda_emulation::exchange(&value, sizeof value);
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= slots[lane * cuda_emulation::kSlot];
    return any;
}
inline long long __double_as_longlong(double x) {
    long long bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, sizeof u);
    return u;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
