// A block per row, sums in shared memory
//
// Threads next to each other read numbers next to each other: a warp's 32 floats are four whole sectors of 32 bytes. Each thread adds up
// every 256th number of the row, then the 256 sums are added in a tree: half of the threads add the other half's, again and again,
// with a barrier each time. Barriers are what it now waits for: eight for each of two sums.
#include "kernel.cuh"

constexpr int kThreads = 256;

// The sum of x over the block, which every thread gets.
__device__ float block_sum(float x) {
    __shared__ float sums[kThreads];
    __syncthreads();  // another sum may still be read
    sums[threadIdx.x] = x;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

__global__ void layernorm_forward(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                                  const float* bias, int64_t C) {
    const int64_t r = blockIdx.x;
    const float* x = inp + r * C;
    float* y = out + r * C;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < C; c += kThreads) sum += x[c];
    const float m = block_sum(sum) / static_cast<float>(C);
    float squares = 0.0f;
    for (int64_t c = threadIdx.x; c < C; c += kThreads) squares += (x[c] - m) * (x[c] - m);
    const float s = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(C) + 1e-5f);
    for (int64_t c = threadIdx.x; c < C; c += kThreads) y[c] = (x[c] - m) * s * weight[c] + bias[c];
    if (threadIdx.x == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    layernorm_forward<<<N, kThreads>>>(out, mean, rstd, inp, weight, bias, C);
}
