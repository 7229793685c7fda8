// A thread per number, with tanhf
//
// The CPU's loop, one number to a thread.
#include "kernel.cuh"

__global__ void gelu_backward(float* dinp, const float* inp, const float* dout, int64_t N) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= N) return;
    const float x = inp[i], t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    const float slope = 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
    dinp[i] = dout[i] * (0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope);
}

KERNEL void run(float* dinp, const float* inp, const float* dout, int64_t N) {
    constexpr int threads = 256;
    gelu_backward<<<ceil_div(N, threads), threads>>>(dinp, inp, dout, N);
}
