// The instructions of Hopper's warpgroup matmul (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate"),
// beside ptx.cuh. They are of sm_90a alone: no other GPU, older or newer, has them.
//
// A warpgroup is 4 warps, of which the first has a number divisible by 4. D (64 x 64, float32) += A B, where warp w holds
// rows 16 w.. of D, and of A if A is in registers, as fragments of mma.m16n8k16 (ptx.cuh): d[t] is the fragment of columns
// 8 t... An operand in shared memory is a tile, named by a descriptor.
//
// A matmul runs on while the warps do. From wgmma_fence(), which comes first, to wgmma_wait() neither D nor A's registers
// may be touched, nor may shared memory be written that it reads. If ptxas finds that the code does so, it says that wgmma
// is serialized (C7510 to C7515), and waits behind each.
//
// A in registers is for what is computed anew before each matmul. Registers that had been loaded once, before a loop of
// matmuls, were given to other values within the loop by ptxas 13.0.88, without a warning.
#pragma once

#include "cuda/ptx.cuh"

namespace llmc::ptx {

// Describes a tile of bf16 rows, 64 values (128 bytes) each, of which 16-byte part c of row r lies at part c ^ r % 8. The
// tile begins at a multiple of 1024 bytes. The rows are along N or M, the columns along K; or, for a transposed operand,
// the rows along K and the columns along N. A descriptor's fields, from bit 0: the address, the distance of neighbours in
// the leading dimension (unused for rows of 128 bytes), the distance of groups of 8 rows, and the swizzle, all but it in
// units of 16 bytes. Only the lower half differs between tiles.
constexpr std::uint32_t kTileUpperHalf = 1024 >> 4 | 1u << 30;
__device__ __forceinline__ std::uint32_t tile_descriptor(const void* tile) {
    return (shared_address(tile) & 0x3ffff) >> 4 | 1u << 16;
}
// The same tile from `bytes` further on: 32 for the next 16 columns, a multiple of 1024 for rows further on.
__device__ __forceinline__ std::uint32_t further(std::uint32_t descriptor, int bytes) {
    return descriptor + static_cast<std::uint32_t>(bytes >> 4);
}

}  // namespace llmc::ptx

#if defined(LLMC_CUDA_EMULATION)
#include "ptx_sm90_emulated.h"
#else

namespace llmc::ptx {

// What this thread has written to shared memory, by plain stores or by cp.async that it has waited for, is seen by
// matmuls that begin behind the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last `pending` groups are done. What they have written is to be passed to hold().
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// clang-format off
#define LLMC_ACCUMULATORS \
    "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
    "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), \
    "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
    "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), \
    "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
    "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
    "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
    "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
// clang-format on

// The compiler knows nothing of what happens between a matmul's start and its end: behind this it takes d for new values.
__device__ __forceinline__ void hold(float (&d)[8][4]) { asm volatile("" : LLMC_ACCUMULATORS::"memory"); }

// clang-format off
// d = A B, or d += A B if accumulate. A (64 x 16) is the rows of one tile, B (16 x 64) the rows of another, transposed.
__device__ __forceinline__ void wgmma(float (&d)[8][4], std::uint32_t a, std::uint32_t b, bool accumulate) {
    asm volatile(
        "{ .reg .pred p; .reg .b64 a, b;"
        "setp.ne.b32 p, %34, 0; mov.b64 a, {%32, %35}; mov.b64 b, {%33, %35};"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "a, b, p, 1, 1, 0, 0; }"
        : LLMC_ACCUMULATORS
        : "r"(a), "r"(b), "r"(int{accumulate}), "r"(kTileUpperHalf));
}
// d += A B. A is in registers, B is 16 rows of a tile.
__device__ __forceinline__ void wgmma_transposed(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint32_t b) {
    asm volatile(
        "{ .reg .pred p; .reg .b64 b;"
        "setp.eq.b32 p, 0, 0; mov.b64 b, {%36, %37};"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, b, p, 1, 1, 1; }"
        : LLMC_ACCUMULATORS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kTileUpperHalf));
}
// clang-format on
#undef LLMC_ACCUMULATORS

}  // namespace llmc::ptx

#endif
