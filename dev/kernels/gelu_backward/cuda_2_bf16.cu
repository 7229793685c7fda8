// By one exponential, eight bf16 at a time
//
// 1 - s is e s, without a subtraction. Where e is infinite, s is 0 and e s would be NaN: so e is kept finite.
#include "kernel.cuh"

__device__ bf16 gradient(bf16 inp, bf16 dout) {
    const float x = to_float(inp);
    const float e = fminf(__expf(-1.5957691216f * (x + 0.044715f * x * x * x)), 3e38f);
    const float s = llmc::ptx::reciprocal(1.0f + e);
    const float slope = 1.5957691216f * (1.0f + 3.0f * 0.044715f * x * x);
    return to_bf16(to_float(dout) * (s + x * slope * s * (e * s)));
}

__global__ void gelu_backward(bf16* dinp, const bf16* inp, const bf16* dout, int64_t N) {
    const int64_t i = 8 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i + 8 <= N) {
        bf16x8 x = *reinterpret_cast<const bf16x8*>(inp + i);
        const bf16x8 dy = *reinterpret_cast<const bf16x8*>(dout + i);
#pragma unroll
        for (int k = 0; k < 8; ++k) x.v[k] = gradient(x.v[k], dy.v[k]);
        *reinterpret_cast<bf16x8*>(dinp + i) = x;
    } else {
        for (int64_t tail = i; tail < N; ++tail) dinp[tail] = gradient(inp[tail], dout[tail]);
    }
}

KERNEL void run(bf16* dinp, const bf16* inp, const bf16* dout, int64_t N) {
    constexpr int threads = 256;
    gelu_backward<<<ceil_div(N, 8 * threads), threads>>>(dinp, inp, dout, N);
}
