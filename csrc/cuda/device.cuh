// What kernels share: values in memory (16 bytes at a time, computed in f32), reductions of a warp and of a
// block in a fixed order, and the one way to launch.
//
// W is the number of values that a thread takes at once: 16 bytes of the op's storage type if every row
// begins at a multiple of 16 bytes, else 1. A kernel is written once, over W.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/tensor.h"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

#if defined(LLMC_CUDA_EMULATION)
#define LLMC_SHARED(name, ...) auto& name = ::cuda_emulation::shared_variable<__VA_ARGS__, decltype([] {})>()
#define LLMC_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_emulation::dynamic_shared()
#define LLMC_DYNAMIC_TILES(name) unsigned char* const name = ::cuda_emulation::dynamic_shared()
#else
// Declares a variable in shared memory: LLMC_SHARED(sums, float[32]);
#define LLMC_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name
// Declares the shared memory whose size is given at launch.
#define LLMC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// The same for tiles that wgmma reads (ptx_sm90.cuh).
#define LLMC_DYNAMIC_TILES(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace llmc {

using i64 = std::int64_t;

inline constexpr int kWarp = 32;
inline constexpr int kFewRows = 16;  // up to so many, kernels that are made for generation take them
inline constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// ---- values in memory ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
template <class T>
__device__ __forceinline__ T narrow(float x) {
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return bf16{ptx::bf16_bits(x)};
}

template <int W>
struct Floats {
    float v[W];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const float& operator[](int i) const { return v[i]; }
};
template <int W>
__device__ __forceinline__ Floats<W> zeros() {
    Floats<W> x;
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = 0.0f;
    return x;
}

// W values as they lie in memory: half the registers of Floats, for bf16. They move in the widest accesses that
// the alignment of their bytes, 16 at most, allows.
template <int W, class T>
struct Packed {
    static constexpr int kBytes = W * sizeof(T), kAligned = kBytes < 16 ? kBytes : 16;
    static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);
    using Word = std::conditional_t<kBytes == 2, std::uint16_t, std::uint32_t>;
    alignas(kAligned) Word words[kBytes / sizeof(Word)];

    __device__ __forceinline__ void load(const T* p) { move(words, p); }
    __device__ __forceinline__ void store(T* p) const { move(p, words); }

    __device__ __forceinline__ Floats<W> floats() const {
        Floats<W> x;
#pragma unroll
        for (int i = 0; i < W; ++i) {
            if constexpr (std::is_same_v<T, float>)
                x[i] = __uint_as_float(words[i]);
            else if constexpr (W == 1)
                x[i] = widen(bf16{words[0]});
            else
                x[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        }
        return x;
    }
    __device__ __forceinline__ void forget() {
#pragma unroll
        for (Word& word : words) ptx::forget(word);
    }
    __device__ __forceinline__ static Packed of(const Floats<W>& x) {
        Packed packed;
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int i = 0; i < W; ++i) packed.words[i] = __float_as_uint(x[i]);
        } else if constexpr (W == 1) {
            packed.words[0] = ptx::bf16_bits(x[0]);
        } else {
#pragma unroll
            for (int i = 0; i < W / 2; ++i) packed.words[i] = ptx::bf16x2_bits(x[2 * i], x[2 * i + 1]);
        }
        return packed;
    }

  private:
    __device__ __forceinline__ static void move(void* to, const void* from) {
#if defined(LLMC_CUDA_EMULATION)
        cuda_emulation::check_aligned(to, kAligned);
        cuda_emulation::check_aligned(from, kAligned);
        std::memcpy(to, from, kBytes);
#else
        if constexpr (kBytes == 2)
            *static_cast<std::uint16_t*>(to) = *static_cast<const std::uint16_t*>(from);
        else if constexpr (kBytes == 4)
            *static_cast<std::uint32_t*>(to) = *static_cast<const std::uint32_t*>(from);
        else if constexpr (kBytes == 8)
            *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
        else
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i)
                static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
#endif
    }
};

// p must be a multiple of min(16, W sizeof(T)) bytes.
template <int W, class T>
__device__ __forceinline__ Packed<W, T> load_packed(const T* p) {
    Packed<W, T> x;
    x.load(p);
    return x;
}
template <int W, class T>
__device__ __forceinline__ Floats<W> load(const T* p) {
    return load_packed<W>(p).floats();
}
template <int W, class T>
__device__ __forceinline__ void store(T* p, const Floats<W>& x) {
    Packed<W, T>::of(x).store(p);
}

// ---- reductions: every thread receives the result; the order does not depend on timing ----

struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Max {  // in one instruction; of a number and a NaN it returns the number
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        x = op(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

// For one-dimensional blocks of whole warps. It has barriers, so every thread of the block must call it.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T x, T identity, Op op) {
    LLMC_SHARED(partial, T[kWarp]);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = warp_reduce(x, op);
    __syncthreads();  // the last reduction may still be reading
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_reduce(lane < warps ? partial[lane] : identity, op);
}

// True in the last of `blocks` blocks that come here; it then sees what the others have stored before (to be read by
// __ldcg: L1 may hold what was there earlier). *arrived is 0 before and after. Every thread of the block must call it.
__device__ __forceinline__ bool last_of_blocks(unsigned* arrived, unsigned blocks) {
    LLMC_SHARED(last, bool);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) == blocks - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// ---- launching ----

// Waits for the kernels before this one, and only then lets the next one begin. So no more than two run at once. Before
// its wait, a kernel reads only what no kernel of the chain writes (CudaBackend::at_rest), which is more than is needed, but does
// not depend on how far back a kernel is.
__device__ __forceinline__ void overlap_kernels() {
    ptx::wait_for_kernels_before();
    ptx::begin_next_kernel();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, LaunchStream stream,
            Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // nothing to do
#if defined(LLMC_CUDA_EMULATION)
    cuda_emulation::launch(stream.stream, grid, block, shared, [=] { kernel(Parameters(arguments)...); });
#else
    constexpr std::size_t kUnasked = 48 << 10;  // more needs the attribute below
    if (shared > kUnasked)
        CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = shared, config.stream = stream.stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap, config.numAttrs = stream.overlap ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// Blocks of `threads` for n items. 2^31 - 1 blocks are the hardware's limit; no tensor that fits comes near.
inline unsigned blocks_for(i64 n, i64 threads) {
    const i64 blocks = ceil_div(n, threads);
    LLMC_CHECK(blocks <= 0x7fffffff, "{} elements are more than one launch covers", n);
    return static_cast<unsigned>(blocks);
}
__device__ __forceinline__ i64 global_thread() {
    return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Calls body with a value of the C++ type of a float dtype, as in csrc/cpu.
template <class Body>
void visit_float(DType dtype, Body&& body) {
    if (dtype == DType::f32)
        body(float{});
    else
        body(bf16{});
}

// Calls body with W as an integral_constant: 16 bytes of T if `row` and all pointers are aligned to that, else 1.
template <class T, class Body, class... Pointers>
void visit_width(i64 row, Body&& body, Pointers... pointers) {
    constexpr int wide = 16 / sizeof(T);
    const bool aligned = row % wide == 0 && (... && (reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0));
    if (aligned)
        body(std::integral_constant<int, wide>{});
    else
        body(std::integral_constant<int, 1>{});
}

// ---- elementwise ops: Op has  template <int W> __device__ void at(i64 i) const  for elements i..i+W ----

template <int W, class Op>
__global__ void elementwise_kernel(i64 n, Op op) {
    const i64 i = global_thread() * W;
    if (i + W <= n)
        op.template at<W>(i);
    else
        for (i64 tail = i; tail < n; ++tail) op.template at<1>(tail);
}
template <class T, class Op, class... Pointers>
void launch_elementwise(cudaStream_t stream, i64 n, const Op& op, Pointers... pointers) {
    constexpr int kThreads = 256;
    visit_width<T>(
        0,
        [&](auto width) {
            constexpr int W = decltype(width)::value;
            launch(elementwise_kernel<W, Op>, blocks_for(ceil_div(n, W), kThreads), kThreads, 0, stream, n,
                   op);
        },
        pointers...);
}

}  // namespace llmc
