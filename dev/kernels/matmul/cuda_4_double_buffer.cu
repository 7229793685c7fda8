// Vectors from global memory, and two buffers
//
// Global memory takes hundreds of cycles to answer, and in the version before all threads waited for it in every step. Here a step's
// values are asked for before the step before is computed, arrive in registers meanwhile, and go to the other one of two
// buffers: one barrier a step instead of two. A thread loads 4 neighbours at a time, and stores 4 results at a time.
#include "kernel.cuh"

constexpr int kTile = 128, kDepth = 8, kThreads = 256;

// Elements c .. c + 3 of a row, 0 where there is none.
__device__ __forceinline__ float4 load4(const float* matrix, int64_t row, int64_t rows, int64_t c,
                                        int64_t C) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row >= rows || c >= C) return v;
    const float* const p = matrix + row * C + c;
    if (C % 4 == 0) return *reinterpret_cast<const float4*>(p);  // aligned
    v.x = p[0];
    if (c + 1 < C) v.y = p[1];
    if (c + 2 < C) v.z = p[2];
    if (c + 3 < C) v.w = p[3];
    return v;
}

struct Tile {
    float4 at[kDepth][kTile / 4];  // k first
    __device__ __forceinline__ void store(int row, int k, float4 v) {
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(at[k + i])[row] = values[i];
    }
};

__global__ void __launch_bounds__(kThreads, 2) matmul(float* out, const float* inp, const float* weight,
                                                      const float* bias, int64_t N, int64_t C, int64_t OC) {
    __shared__ Tile a[2];
    __shared__ Tile b[2];
    const int t = threadIdx.x, x = t % 16, y = t / 16;
    const int row = t / 2, k0 = t % 2 * 4;  // what this thread loads: 256 times 4 of 128 x 8 values
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    float sum[8][8] = {};
    float4 next_a = load4(inp, n0 + row, N, k0, C), next_b = load4(weight, o0 + row, OC, k0, C);
    a[0].store(row, k0, next_a);
    b[0].store(row, k0, next_b);
    __syncthreads();
    int buffer = 0;
    for (int64_t c = 0; c < C; c += kDepth) {
        next_a = load4(inp, n0 + row, N, c + kDepth + k0, C);
        next_b = load4(weight, o0 + row, OC, c + kDepth + k0, C);
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            const float4 a0 = a[buffer].at[k][y], a1 = a[buffer].at[k][16 + y];
            const float4 b0 = b[buffer].at[k][x], b1 = b[buffer].at[k][16 + x];
            const float left[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
            const float right[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] += left[i] * right[j];
        }
        buffer = 1 - buffer;
        a[buffer].store(row, k0, next_a);
        b[buffer].store(row, k0, next_b);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t n = n0 + i / 4 * 64 + y * 4 + i % 4;
        if (n >= N) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t o = o0 + half * 64 + x * 4;
            const float* const s = sum[i] + half * 4;
            if (OC % 4 == 0 && o < OC) {
                const float4 shift = *reinterpret_cast<const float4*>(bias + o);
                *reinterpret_cast<float4*>(out + n * OC + o) =
                    make_float4(s[0] + shift.x, s[1] + shift.y, s[2] + shift.z, s[3] + shift.w);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (o + j < OC) out[n * OC + o + j] = s[j] + bias[o + j];
            }
        }
    }
}

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    matmul<<<dim3(ceil_div(OC, kTile), ceil_div(N, kTile)), kThreads>>>(out, inp, weight, bias, N, C, OC);
}
