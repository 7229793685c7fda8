// A thread per number, with tanhf
//
// Threads next to each other read numbers next to each other, so this already moves memory in whole lines. What remains is the instructions
// that are not loads, of which tanhf has many, and two branches for large and small arguments.
#include "kernel.cuh"

__global__ void gelu_forward(float* out, const float* inp, int64_t N) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= N) return;
    const float x = inp[i], u = 0.7978845608f * (x + 0.044715f * x * x * x);
    out[i] = 0.5f * x * (1.0f + tanhf(u));
}

KERNEL void run(float* out, const float* inp, int64_t N) {
    constexpr int threads = 256;
    gelu_forward<<<ceil_div(N, threads), threads>>>(out, inp, N);
}
