// By one exponential, four numbers at a time
//
// x / (1 + e^-2u) needs no branch. A thread loads and stores 16 bytes at once: a quarter of the instructions, and four times the bytes on
// their way to hide the latency of memory with.
#include "kernel.cuh"

__device__ float gelu(float x) { return x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

__global__ void gelu_forward(float* out, const float* inp, int64_t N) {
    const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i + 4 <= N) {
        float4 x = *reinterpret_cast<const float4*>(inp + i);
        x.x = gelu(x.x);
        x.y = gelu(x.y);
        x.z = gelu(x.z);
        x.w = gelu(x.w);
        *reinterpret_cast<float4*>(out + i) = x;
    } else {
        for (int64_t tail = i; tail < N; ++tail) out[tail] = gelu(inp[tail]);
    }
}

KERNEL void run(float* out, const float* inp, int64_t N) {
    constexpr int threads = 256;
    gelu_forward<<<ceil_div(N, 4 * threads), threads>>>(out, inp, N);
}
