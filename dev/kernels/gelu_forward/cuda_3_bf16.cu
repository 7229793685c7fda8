// Half of the bytes: eight bf16 at a time
//
// The quotient is an approximation of the hardware, right to one unit in the last place of f32: far below what bf16 keeps, and a few
// instructions in place of a dozen. csrc/cuda/gelu.cu does this; so does the end of csrc/cuda's matmuls, where gelu costs no memory at
// all.
#include "kernel.cuh"

__device__ bf16 gelu(bf16 h) {
    const float x = to_float(h);
    return to_bf16(x * llmc::ptx::reciprocal(1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x))));
}

__global__ void gelu_forward(bf16* out, const bf16* inp, int64_t N) {
    const int64_t i = 8 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i + 8 <= N) {
        bf16x8 x = *reinterpret_cast<const bf16x8*>(inp + i);
#pragma unroll
        for (bf16& h : x.v) h = gelu(h);
        *reinterpret_cast<bf16x8*>(out + i) = x;
    } else {
        for (int64_t tail = i; tail < N; ++tail) out[tail] = gelu(inp[tail]);
    }
}

KERNEL void run(bf16* out, const bf16* inp, int64_t N) {
    constexpr int threads = 256;
    gelu_forward<<<ceil_div(N, 8 * threads), threads>>>(out, inp, N);
}
