// bf16 on tensor cores
//
// mma multiplies 16 x 16 by 16 x 8 bf16, into f32 sums that the 32 threads of a warp hold together: 4,096 FLOP in one instruction,
// where the warp's multiply-adds make 64. A block computes 128 x 128 elements with 8 warps, a warp 64 x 32 of them: 4 by 4 products, from 6
// loads. Each load, ldmatrix, fetches four 8 x 8 matrices from shared memory just as mma wants them (csrc/cuda/ptx.cuh has the layout of
// lanes). Rows in shared memory are 40 elements apart instead of 32, so that the 8 rows of a matrix lie in different banks.
#include "kernel.cuh"

namespace ptx = llmc::ptx;

constexpr int kTile = 128, kDepth = 32, kThreads = 256, kStride = kDepth + 8;

// Elements c .. c + 7 of a row, 0 where there is none.
__device__ __forceinline__ bf16x8 load8(const bf16* matrix, int64_t row, int64_t rows, int64_t c, int64_t C) {
    bf16x8 v = {};
    if (row >= rows || c >= C) return v;
    const bf16* const p = matrix + row * C + c;
    if (C % 8 == 0) return *reinterpret_cast<const bf16x8*>(p);  // aligned
    for (int i = 0; i < 8; ++i)
        if (c + i < C) v.v[i] = p[i];
    return v;
}

__global__ void __launch_bounds__(kThreads, 2) matmul(bf16* out, const bf16* inp, const bf16* weight,
                                                      const bf16* bias, int64_t N, int64_t C, int64_t OC) {
    __shared__ bf16x8 a[kTile * kStride / 8];
    __shared__ bf16x8 b[kTile * kStride / 8];
    const int t = threadIdx.x, warp = t / kWarp, lane = t % kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    const int warp_n = warp / 4 * 64, warp_o = warp % 4 * 32;
    // Whose row each lane names to ldmatrix. Left: rows 0-7, rows 8-15, then both 8 columns further on. Right: rows 0-7 of weight, the same 8
    // columns further on, then rows 8-15.
    const bf16* const left = &a[0].v[0] + (warp_n + lane % 16) * kStride + lane / 16 * 8;
    const bf16* const right = &b[0].v[0] + (warp_o + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
    float sum[4][4][4] = {};  // [16 rows][8 columns][what a lane has of them]
    for (int64_t c = 0; c < C; c += kDepth) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {  // 512 times 8 elements of each
            const int row = (turn * kThreads + t) / 4, k = t % 4 * 8;
            a[(row * kStride + k) / 8] = load8(inp, n0 + row, N, c + k, C);
            b[(row * kStride + k) / 8] = load8(weight, o0 + row, OC, c + k, C);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t x[4][4], w[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4(x[i], left + i * 16 * kStride + k);
#pragma unroll
            for (int j = 0; j < 2; ++j) ptx::ldmatrix_x4(w[j], right + j * 16 * kStride + k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    ptx::mma_bf16(sum[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
        __syncthreads();
    }
    // A lane has two neighbours of row lane / 4, and two of the row 8 below.
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t n = n0 + warp_n + i * 16 + half * 8 + lane / 4,
                              o = o0 + warp_o + j * 8 + lane % 4 * 2;
                if (n < N && o < OC) out[n * OC + o] = to_bf16(sum[i][j][half * 2] + to_float(bias[o]));
                if (n < N && o + 1 < OC)
                    out[n * OC + o + 1] = to_bf16(sum[i][j][half * 2 + 1] + to_float(bias[o + 1]));
            }
}

KERNEL void run(bf16* out, const bf16* inp, const bf16* weight, const bf16* bias, int64_t N, int64_t C,
                int64_t OC) {
    matmul<<<dim3(ceil_div(OC, kTile), ceil_div(N, kTile)), kThreads>>>(out, inp, weight, bias, N, C, OC);
}
