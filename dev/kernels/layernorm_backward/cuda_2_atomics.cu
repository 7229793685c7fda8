// A warp per row, atomic additions to the parameters: other bits each time
//
// dout and inp are read by one kernel for all three outputs. What the rows have in common, dweight and dbias, every warp adds to as it
// comes. An atomic addition loses nothing, but the order of the sum is that in which the warps happen to run, and so are its rounding
// errors: two runs of a training with the same seed are no longer the same. And all N rows queue up at each of 2 C addresses.
#include "kernel.cuh"

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

__global__ void layernorm_backward(float* dinp, float* dweight, float* dbias, const float* dout,
                                   const float* inp, const float* weight, const float* mean,
                                   const float* rstd, int64_t N, int64_t C) {
    const int64_t r = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (r >= N) return;
    const float *dy = dout + r * C, *x = inp + r * C;
    float* dx = dinp + r * C;
    const float m = mean[r], s = rstd[r];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int64_t c = lane; c < C; c += kWarp) {
        const float d = dy[c], n = (x[c] - m) * s, g = d * weight[c];
        sum_g += g;
        sum_gn += g * n;
        atomicAdd(dweight + c, d * n);
        atomicAdd(dbias + c, d);
    }
    const float avg_g = warp_sum(sum_g) / static_cast<float>(C);
    const float avg_gn = warp_sum(sum_gn) / static_cast<float>(C);
    for (int64_t c = lane; c < C; c += kWarp) {
        const float n = (x[c] - m) * s, g = dy[c] * weight[c];
        dx[c] += s * (g - avg_g - n * avg_gn);
    }
}

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    constexpr int threads = 256;  // 8 rows
    layernorm_backward<<<ceil_div(N * kWarp, threads), threads>>>(dinp, dweight, dbias, dout, inp, weight,
                                                                  mean, rstd, N, C);
}
