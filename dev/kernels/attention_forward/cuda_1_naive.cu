// Three kernels and a matrix of T x T scores
//
// A thread for each score, then a thread for each row of the softmax, then a thread for each number of the output. The matrix
// of all heads goes through the GPU's memory seven times, five of them in the softmax: 12 heads at T = 1024 are 50 MB for each
// sequence, where queries, keys and values are 9 MB. In the softmax, neighbouring threads read addresses that are T floats apart.
#include "kernel.cuh"

constexpr int HS = 64;  // channels of a head, in every GPT-2

__global__ void scores(float* p, const float* qkv, int64_t B, int64_t T, int64_t NH, float scale) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= B * NH * T * T) return;
    const int64_t j = index % T, i = index / T % T, h = index / (T * T) % NH, b = index / (T * T * NH);
    const int64_t C = NH * HS;
    const float* q = qkv + (b * T + i) * 3 * C + h * HS;
    const float* k = qkv + (b * T + j) * 3 * C + C + h * HS;
    float s = 0;
    for (int c = 0; c < HS; ++c) s += q[c] * k[c];
    p[index] = j <= i ? s * scale : -INFINITY;
}

__global__ void softmax(float* p, float* lse, int64_t rows, int64_t T) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float* x = p + row * T;
    float largest = -INFINITY, total = 0;
    for (int64_t j = 0; j < T; ++j) largest = fmaxf(largest, x[j]);
    for (int64_t j = 0; j < T; ++j) total += x[j] = expf(x[j] - largest);
    for (int64_t j = 0; j < T; ++j) x[j] /= total;
    lse[row] = largest + logf(total);
}

__global__ void values(float* out, const float* p, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, C = NH * HS;
    if (index >= B * T * C) return;
    const int64_t c = index % C, i = index / C % T, b = index / (C * T), h = c / HS;
    const float *x = p + ((b * NH + h) * T + i) * T, *v = qkv + b * T * 3 * C + 2 * C + c;
    float o = 0;
    for (int64_t j = 0; j < T; ++j) o += x[j] * v[j * 3 * C];
    out[index] = o;
}

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    constexpr int threads = 256;
    const int64_t rows = B * NH * T;
    float* p = scratch<float>(rows * T);
    scores<<<ceil_div(rows * T, threads), threads>>>(p, qkv, B, T, NH, 0.125f);
    softmax<<<ceil_div(rows, threads), threads>>>(p, lse, rows, T);
    values<<<ceil_div(rows * HS, threads), threads>>>(out, p, qkv, B, T, NH);
}
