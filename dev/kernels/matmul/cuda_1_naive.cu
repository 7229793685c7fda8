// A thread for each element
//
// A thread makes one dot product. For each multiply-add it loads two floats, so the load units are the limit, not the arithmetic.
// And the 32 threads of a warp, neighbours along o, read 32 rows of the weight: each load touches 32 cache lines, of which
// the next 31 loads use the rest, if the lines are still there.
#include "kernel.cuh"

__global__ void matmul(float* out, const float* inp, const float* weight, const float* bias, int64_t N,
                       int64_t C, int64_t OC) {
    const int64_t o = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t n = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    if (o >= OC || n >= N) return;
    float sum = bias[o];
    for (int64_t c = 0; c < C; ++c) sum += inp[n * C + c] * weight[o * C + c];
    out[n * OC + o] = sum;
}

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    const dim3 block(32, 8), grid(ceil_div(OC, block.x), ceil_div(N, block.y));
    matmul<<<grid, block>>>(out, inp, weight, bias, N, C, OC);
}
