// The online softmax: a thread for each query
//
// A thread keeps its query, its output, a running maximum and a sum in registers, and walks along the keys. Scores exist one at a time.
// All threads of a block belong to one head and read the same key at the same moment, which memory serves once for a warp.
// What is left to gain: each thread does its 2 x 64 multiply-adds a key with one number of memory each, and a query at the end of
// a sequence has T keys to go through alone.
#include "kernel.cuh"

constexpr int HS = 64, kThreads = 64;

__global__ void attention(float* out, float* lse, const float* qkv, int T, int NH, float scale) {
    const int i = blockIdx.x * kThreads + threadIdx.x, h = blockIdx.y % NH, b = blockIdx.y / NH;
    if (i >= T) return;
    const int C = NH * HS;
    const float* qkv_of_head = qkv + int64_t(b) * T * 3 * C + h * HS;
    float q[HS], o[HS];
#pragma unroll
    for (int c = 0; c < HS; ++c) {
        q[c] = qkv_of_head[int64_t(i) * 3 * C + c] * scale;
        o[c] = 0;
    }
    float largest = -INFINITY, total = 0;
    for (int j = 0; j <= i; ++j) {
        const float *k = qkv_of_head + int64_t(j) * 3 * C + C, *v = k + C;
        float s[4] = {};  // four sums, which do not wait for each other
#pragma unroll
        for (int c = 0; c < HS; ++c) s[c % 4] += q[c] * k[c];
        const float score = (s[0] + s[1]) + (s[2] + s[3]), top = fmaxf(largest, score);
        const float correction = expf(largest - top), p = expf(score - top);
        largest = top;
        total = total * correction + p;
#pragma unroll
        for (int c = 0; c < HS; ++c) o[c] = o[c] * correction + p * v[c];
    }
    float* to = out + (int64_t(b) * T + i) * C + h * HS;
#pragma unroll
    for (int c = 0; c < HS; ++c) to[c] = o[c] / total;
    lse[int64_t(blockIdx.y) * T + i] = largest + logf(total);
}

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    attention<<<dim3(ceil_div(T, kThreads), B * NH), kThreads>>>(out, lse, qkv, T, NH, 0.125f);
}
