// A warp per row, sums by shuffles
//
// The 32 threads of a warp run together and can read each other's registers: five additions across lanes make a sum, without shared memory
// and without a barrier. Each warp goes its own way, so while one waits for memory, the others of the multiprocessor compute.
#include "kernel.cuh"

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;  // in every lane, by the same tree
}

__global__ void layernorm_forward(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                                  const float* bias, int64_t N, int64_t C) {
    const int64_t r = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (r >= N) return;
    const float* x = inp + r * C;
    float* y = out + r * C;
    float sum = 0.0f;
    for (int64_t c = lane; c < C; c += kWarp) sum += x[c];
    const float m = warp_sum(sum) / static_cast<float>(C);
    float squares = 0.0f;
    for (int64_t c = lane; c < C; c += kWarp) squares += (x[c] - m) * (x[c] - m);
    const float s = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(C) + 1e-5f);
    for (int64_t c = lane; c < C; c += kWarp) y[c] = (x[c] - m) * s * weight[c] + bias[c];
    if (lane == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    constexpr int threads = 256;  // 8 rows
    layernorm_forward<<<ceil_div(N * kWarp, threads), threads>>>(out, mean, rstd, inp, weight, bias, N, C);
}
