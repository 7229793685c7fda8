// The instructions that CUDA C++ has no name for, one function each. No other file contains assembly, so the
// emulated build needs to replace this file alone.
//
// A fragment's lanes, for mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), g = lane / 4 and
// i = lane % 4, two bf16 per register, the lower column in the lower half:
//   A (16 x 16)  a0: (g, 2i..)  a1: (g + 8, 2i..)  a2: (g, 2i + 8..)  a3: (g + 8, 2i + 8..)
//   B (16 x 8)   b0: (2i.., g)  b1: (2i + 8.., g)
//   D (16 x 8)   d0, d1: (g, 2i), (g, 2i + 1)      d2, d3: (g + 8, 2i), (g + 8, 2i + 1)
// So the D of one matmul, rounded to bf16, is half of the A of the next, in the same lanes.
#pragma once

#include <cstdint>

#if defined(LLMC_CUDA_EMULATION)
#include "ptx_emulated.h"
#else

namespace llmc::ptx {

// Rounded to nearest even.
__device__ __forceinline__ std::uint16_t bf16_bits(float x) {
    std::uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ std::uint32_t bf16x2_bits(float low, float high) {
    std::uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// 2^x, to 2 ulp; 0 for -infinity.
__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, to 1 ulp; 0 for infinity.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Leaves x as it is, but the compiler takes it for a new value: it computes again what it had computed from x before,
// instead of keeping that in registers.
__device__ __forceinline__ void forget(std::uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void forget(std::uint16_t& x) { asm volatile("" : "+h"(x)); }

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of bf16: lanes 8j..8j+7 give the addresses of the rows of matrix j, 16 bytes each. Lane
// l receives of matrix j the elements (l / 4, 2 (l % 4)) and its right neighbour.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += A B
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, both 16-byte aligned, without passing through registers; zeros if
// not valid. They are there after cp_async_wait, for this thread, and after a barrier, for the others.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same of 4 bytes.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last `pending` groups have arrived.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Kernels that overlap (sm_90; nothing happens on older GPUs, which run one after the other anyway): the first lets the
// next kernel of the stream begin when all blocks have called it or ended, the second waits until the kernels before
// this one have ended and what they wrote can be read.
__device__ __forceinline__ void begin_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for the line of global memory at p to be brought into L2. That is no read: it may come too early.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace llmc::ptx

#endif
