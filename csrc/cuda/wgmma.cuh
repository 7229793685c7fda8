// What the attention kernels on Hopper's warpgroup matmul share (Shah et al. 2024, arXiv:2407.08608): tiles of 64 bf16
// rows of one head in shared memory, as tile_descriptor() has them, and the matmuls between them.
//
// A block is one warpgroup and owns 64 rows, of queries or of keys; warp w has rows 16 w... Three to five blocks share a
// multiprocessor, and while one of them computes weights the matmuls of the others run. (Blocks of several warpgroups load
// less, but wait for each other in each turn: they were slower.) Tiles come by cp.async into two buffers in turns.
#pragma once

#include "core/dims.h"
#include "cuda/heads.cuh"
#include "cuda/ptx_sm90.cuh"

namespace llmc::hopper {

inline constexpr int kHS = 64;  // head size: a row is 128 bytes
inline constexpr int kRows = 64, kThreads = 4 * kWarp, kTile = kRows * kHS;
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

using Product = float[kRows / 8][4];           // a thread's part of 64 rows and columns
using Operand = std::uint32_t[kRows / 16][4];  // the same in bf16, as the left operand of a matmul

// The place of 16-byte part c of row r in a tile.
__device__ __forceinline__ int part(int r, int c) { return r * kHS + (c ^ r % 8) * 8; }

// Copies rows row0.. of one head to a tile, with zeros past the last row; the caller commits and waits. Offsets within
// a tile fit 32 bits (wgmma_supports).
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* head, int stride, int row0, int T_) {
    constexpr int kTurnRows = kThreads / 8;
    const int r = static_cast<int>(threadIdx.x) / 8, c = static_cast<int>(threadIdx.x) % 8;
    const bf16* const from = head + static_cast<i64>(row0 + r) * stride + c * 8;
    bf16* const to = tile + part(r, c);
#pragma unroll
    for (int row = 0; row < kRows; row += kTurnRows)
        ptx::cp_async16(to + row * kHS, from + row * stride, row0 + r + row < T_);
}

// The tiles that were fetched are there for all threads and their matmuls, and those of the turn before are not read any
// more. To be called once in each turn, before the next tiles are fetched.
__device__ __forceinline__ void arrive() {
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();
}

// Starts s = A B^T for two tiles.
__device__ __forceinline__ void start_rows(Product& s, std::uint32_t a, std::uint32_t b) {
#pragma unroll
    for (int k = 0; k < kHS / 16; ++k) ptx::wgmma(s, ptx::further(a, 32 * k), ptx::further(b, 32 * k), k > 0);
}
// Starts o += A B, where A is a product of start_rows, and B a tile.
__device__ __forceinline__ void start_values(Product& o, const Operand& a, std::uint32_t b) {
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) ptx::wgmma_transposed(o, a[k], ptx::further(b, 16 * 128 * k));
}

__device__ __forceinline__ void as_operand(Operand& a, const Product& s) {
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            a[k][r] = ptx::bf16x2_bits(s[2 * k + r / 2][r % 2 * 2], s[2 * k + r / 2][r % 2 * 2 + 1]);
}

__device__ __forceinline__ void clear(Product& x) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) x[n][j] = 0.0f;
}

// Gives `value` to the elements that belong to a key behind the query; row and column are those of x[0][0].
template <bool rows_are_keys>
__device__ __forceinline__ void mask(Product& x, int row, int column, float value) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = row + j / 2 * 8, c = column + n * 8 + j % 2;
            if (rows_are_keys ? r > c : c > r) x[n][j] = value;
        }
}

// Stores a block's result, of which scale[0] is for row g of each warp and scale[1] for row g + 8, to rows row0.. of a
// head: by way of a tile that is read no more when all warps are here, so that whole rows are written.
__device__ __forceinline__ void store_rows(bf16* head, int stride, int row0, int T_, bf16* tile,
                                           const Product& x, const float (&scale)[2]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    bf16* const mine = tile + warp * 16 * kHS;
    const int first = row0 + warp * 16;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kHS / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            store(mine + part(g + half * 8, n) + 2 * i,
                  Floats<2>{x[n][2 * half] * scale[half], x[n][2 * half + 1] * scale[half]});
    __syncwarp();
#pragma unroll
    for (int row = 0; row < 16; row += 4) {
        const int r = row + lane / 8, c = lane % 8;
        if (first + r < T_)
            load_packed<8>(mine + part(r, c)).store(head + static_cast<i64>(first + r) * stride + c * 8);
    }
}

}  // namespace llmc::hopper
