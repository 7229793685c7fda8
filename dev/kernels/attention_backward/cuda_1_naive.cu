// Four kernels and two matrices of T x T
//
// A thread for each pair of a query and a key makes p and dp, a thread for each row turns dp into ds, and a thread for each channel of a
// row adds up what dq, dk or dv want. p and ds of all heads, 2 x 50 MB for 12 heads at T = 1024, are written once and read
// several times, and half of them are zeros.
#include "kernel.cuh"

constexpr int HS = 64;  // channels of a head, in every GPT-2

__global__ void probabilities(float* p, float* dp, const float* dout, const float* qkv, const float* lse,
                              int64_t B, int64_t T, int64_t NH, float scale) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= B * NH * T * T) return;
    const int64_t j = index % T, i = index / T % T, h = index / (T * T) % NH, b = index / (T * T * NH);
    const int64_t C = NH * HS;
    const float* q = qkv + (b * T + i) * 3 * C + h * HS;
    const float* k = qkv + (b * T + j) * 3 * C + C + h * HS;
    const float *v = k + C, *d = dout + (b * T + i) * C + h * HS;
    float s = 0, g = 0;
    for (int c = 0; c < HS; ++c) {
        s += q[c] * k[c];
        g += d[c] * v[c];
    }
    p[index] = j <= i ? expf(s * scale - lse[index / T]) : 0.0f;
    dp[index] = g;
}

// Turns dp into ds, the gradient of the scores before they were scaled.
__global__ void softmax_backward(float* dp, const float* p, int64_t rows, int64_t T, float scale) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float mean = 0;
    for (int64_t j = 0; j < T; ++j) mean += p[row * T + j] * dp[row * T + j];
    for (int64_t j = 0; j < T; ++j) dp[row * T + j] = p[row * T + j] * (dp[row * T + j] - mean) * scale;
}

__global__ void gradients(float* dqkv, const float* p, const float* ds, const float* dout, const float* qkv,
                          int64_t B, int64_t T, int64_t NH) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, C = NH * HS;
    if (index >= B * T * C) return;
    const int64_t c = index % C, t = index / C % T, b = index / (C * T), h = c / HS;
    const int64_t head = (b * NH + h) * T * T;
    const float *q = qkv + b * T * 3 * C + c, *k = q + C, *d = dout + b * T * C + c;
    float x = 0, y = 0, z = 0;
    for (int64_t u = 0; u < T; ++u) {
        x += ds[head + t * T + u] * k[u * 3 * C];
        y += ds[head + u * T + t] * q[u * 3 * C];
        z += p[head + u * T + t] * d[u * C];
    }
    float* to = dqkv + (b * T + t) * 3 * C + c;
    to[0] = x;
    to[C] = y;
    to[2 * C] = z;
}

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    (void)out;  // what the next version takes it for is summed here from p and dp
    constexpr int threads = 256;
    const int64_t rows = B * NH * T;
    float *p = scratch<float, 0>(rows * T), *ds = scratch<float, 1>(rows * T);
    probabilities<<<ceil_div(rows * T, threads), threads>>>(p, ds, dout, qkv, lse, B, T, NH, 0.125f);
    softmax_backward<<<ceil_div(rows, threads), threads>>>(ds, p, rows, T, 0.125f);
    gradients<<<ceil_div(rows * HS, threads), threads>>>(dqkv, p, ds, dout, qkv, B, T, NH);
}
