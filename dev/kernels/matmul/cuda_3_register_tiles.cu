// 8 x 8 sums in the registers of a thread
//
// A block computes 128 x 128 elements with 256 threads. For 64 multiply-adds a thread loads 8 values of inp and 8 of weight from shared
// memory, as 4 vectors of 4: one load instruction for 16 multiply-adds, where there were two for one. Tiles lie k first, so that what a thread
// takes is side by side. It takes it as 4 and 4, 64 apart: then the threads of a warp read vectors that are neighbours, and no
// two of them wait for the same bank.
#include "kernel.cuh"

constexpr int kTile = 128, kDepth = 8, kThreads = 256;

__global__ void __launch_bounds__(kThreads) matmul(float* out, const float* inp, const float* weight,
                                                   const float* bias, int64_t N, int64_t C, int64_t OC) {
    __shared__ float4 a[kDepth][kTile / 4];
    __shared__ float4 b[kDepth][kTile / 4];
    const int t = threadIdx.x, x = t % 16, y = t / 16;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    float sum[8][8] = {};
    for (int64_t c = 0; c < C; c += kDepth) {
#pragma unroll
        for (int i = t; i < kTile * kDepth; i += kThreads) {
            const int row = i / kDepth, k = i % kDepth;
            reinterpret_cast<float*>(a[k])[row] =
                n0 + row < N && c + k < C ? inp[(n0 + row) * C + c + k] : 0.0f;
            reinterpret_cast<float*>(b[k])[row] =
                o0 + row < OC && c + k < C ? weight[(o0 + row) * C + c + k] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            const float4 a0 = a[k][y], a1 = a[k][16 + y], b0 = b[k][x], b1 = b[k][16 + x];
            const float left[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
            const float right[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] += left[i] * right[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t n = n0 + i / 4 * 64 + y * 4 + i % 4;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int64_t o = o0 + j / 4 * 64 + x * 4 + j % 4;
            if (n < N && o < OC) out[n * OC + o] = sum[i][j] + bias[o];
        }
    }
}

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    matmul<<<dim3(ceil_div(OC, kTile), ceil_div(N, kTile)), kThreads>>>(out, inp, weight, bias, N, C, OC);
}
