// Four floats at a time, and the row kept in shared memory
//
// A 16-byte load is one instruction in place of four, and has four times as many bytes on their way: what hides the latency of memory is
// the number of bytes that are asked for. The row waits in shared memory, so that each number crosses L2 and L1 once. A lane reads
// back only what it wrote itself, so this needs no barrier. If C is not a multiple of 4, rows do not begin at multiples of 16 bytes;
// then numbers are taken one by one.
#include "kernel.cuh"

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int W>
struct alignas(4 * W) Floats {
    float v[W];
};

template <int W>
__global__ void layernorm_forward(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                                  const float* bias, int64_t N, int64_t C) {
    extern __shared__ float shared[];
    using Vector = Floats<W>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, vectors = static_cast<int>(C / W);
    const int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
    if (r >= N) return;
    const auto x = reinterpret_cast<const Vector*>(inp + r * C);
    const auto w = reinterpret_cast<const Vector*>(weight), b = reinterpret_cast<const Vector*>(bias);
    const auto y = reinterpret_cast<Vector*>(out + r * C);
    const auto kept = reinterpret_cast<Vector*>(shared + warp * C);
    float sum = 0.0f;
    for (int i = lane; i < vectors; i += kWarp) {
        const Vector v = x[i];
        kept[i] = v;
#pragma unroll
        for (int k = 0; k < W; ++k) sum += v.v[k];
    }
    const float m = warp_sum(sum) / static_cast<float>(C);
    float squares = 0.0f;
    for (int i = lane; i < vectors; i += kWarp) {
        const Vector v = kept[i];
#pragma unroll
        for (int k = 0; k < W; ++k) squares += (v.v[k] - m) * (v.v[k] - m);
    }
    const float s = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(C) + 1e-5f);
    for (int i = lane; i < vectors; i += kWarp) {
        Vector v = kept[i];
        const Vector scale = w[i], shift = b[i];
#pragma unroll
        for (int k = 0; k < W; ++k) v.v[k] = (v.v[k] - m) * s * scale.v[k] + shift.v[k];
        y[i] = v;
    }
    if (lane == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    constexpr int rows = 8;  // of a block: 24 KiB of shared memory at C = 768
    const auto shared = static_cast<std::size_t>(rows * C) * sizeof(float);
    if (C % 4 == 0)
        layernorm_forward<4>
            <<<ceil_div(N, rows), rows * kWarp, shared>>>(out, mean, rstd, inp, weight, bias, N, C);
    else
        layernorm_forward<1>
            <<<ceil_div(N, rows), rows * kWarp, shared>>>(out, mean, rstd, inp, weight, bias, N, C);
}
