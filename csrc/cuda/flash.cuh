// What the flash-attention kernels share (Dao 2023, arXiv:2307.08691): tiles of bf16 rows in shared memory,
// and the two kinds of matmul between them, on tensor cores.
//
// A block has 4 warps and 64 rows, of queries or of keys; a warp owns 16 of the rows. Tiles come by cp.async
// into two buffers in turns. A tile's row is padded by 16 bytes: for the head sizes here (64, 80, 96, 128) the
// 8 rows that ldmatrix reads at once then lie in different banks.
#pragma once

#include "core/dims.h"
#include "cuda/flash.h"
#include "cuda/heads.cuh"

namespace llmc::flash {

inline constexpr int kWarps = 4, kThreads = kWarps * kWarp;
inline constexpr int kRows = 16 * kWarps;  // of a block
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int HS>
inline constexpr int kLd = HS + 8;

// Copies rows row0.. of one head to a tile, with zeros past the last row; the caller commits and waits. Offsets within
// a tile fit 32 bits (flash_supports). The number of turns is constant so that the loop unrolls.
template <int HS, int rows>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* head, int stride, int row0, int T_) {
    constexpr int kChunks = rows * (HS / 8);  // of 16 bytes
    const bf16* const from = head + static_cast<i64>(row0) * stride;
    const int left = T_ - row0;
#pragma unroll
    for (int turn = 0; turn < (kChunks + kThreads - 1) / kThreads; ++turn) {
        const int i = turn * kThreads + static_cast<int>(threadIdx.x);
        if (kChunks % kThreads != 0 && i >= kChunks) break;
        const int r = i / (HS / 8), c = i % (HS / 8) * 8;
        const bool valid = r < left;
        ptx::cp_async16(tile + r * kLd<HS> + c, from + (valid ? r * stride + c : 0), valid);
    }
}

// The A fragment of 16 rows and columns 16 k.. of a tile.
template <int HS>
__device__ __forceinline__ void load_a(std::uint32_t (&a)[4], const bf16* rows, int k) {
    const int lane = threadIdx.x % kWarp;
    ptx::ldmatrix_x4(a, rows + lane % 16 * kLd<HS> + k * 16 + lane / 16 * 8);
}

// s (16, N) += A B^T, where A is 16 rows of HS, by fragments, and B a tile of N rows.
template <int HS, int N, class A>
__device__ __forceinline__ void multiply_rows(float (&s)[N / 8][4], const A& fragment, const bf16* tile) {
    const int lane = threadIdx.x % kWarp;
    // Matrices: keys 0-7 and channels 0-7, keys 0-7 and channels 8-15, then keys 8-15: two B fragments.
    const bf16* const rows = tile + (lane / 16 * 8 + lane % 8) * kLd<HS> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < HS / 16; ++k) {
        std::uint32_t a[4];
        fragment(a, k);
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            std::uint32_t b[4];
            ptx::ldmatrix_x4(b, rows + n * 16 * kLd<HS> + k * 16);
            ptx::mma_bf16(s[2 * n], a, b[0], b[1]);
            ptx::mma_bf16(s[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// o (16, HS) += P B, where P (16, K) is a result of multiply_rows, rounded to bf16, and B a tile of K rows.
template <int HS, int K>
__device__ __forceinline__ void multiply_values(float (&o)[HS / 8][4], const float (&p)[K / 8][4],
                                                const bf16* tile) {
    const int lane = threadIdx.x % kWarp;
    // Transposed: matrices keys 0-7 and channels 0-7, keys 8-15 and channels 0-7, then channels 8-15.
    const bf16* const rows = tile + lane % 16 * kLd<HS> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        const std::uint32_t a[4] = {ptx::bf16x2_bits(p[2 * k][0], p[2 * k][1]),
                                    ptx::bf16x2_bits(p[2 * k][2], p[2 * k][3]),
                                    ptx::bf16x2_bits(p[2 * k + 1][0], p[2 * k + 1][1]),
                                    ptx::bf16x2_bits(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < HS / 16; ++n) {
            std::uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, rows + k * 16 * kLd<HS> + n * 16);
            ptx::mma_bf16(o[2 * n], a, b[0], b[1]);
            ptx::mma_bf16(o[2 * n + 1], a, b[2], b[3]);
        }
    }
}

template <int tiles>
__device__ __forceinline__ void clear(float (&x)[tiles][4]) {
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[t][i] = 0.0f;
}

// Calls body with the head size as an integral_constant.
template <class Body>
void visit_head_size(i64 HS, Body&& body) {
    switch (HS) {
    case 64: return body(std::integral_constant<int, 64>{});
    case 80: return body(std::integral_constant<int, 80>{});
    case 96: return body(std::integral_constant<int, 96>{});
    case 128: return body(std::integral_constant<int, 128>{});
    }
    throw Error(filled("flash attention has no kernel for a head size of {}", HS));
}

}  // namespace llmc::flash
