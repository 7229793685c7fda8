// Half of the bytes: eight bf16 at a time
//
// As before, with bf16 in memory and f32 in registers. 16 bytes are now eight numbers, and the row waits in shared memory as it was
// stored. csrc/cuda/layernorm.cu does this, and has the residual addition that comes before it in the same kernel.
#include "kernel.cuh"

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int W>
struct alignas(2 * W) Halves {
    bf16 v[W];
};

template <int W>
__global__ void layernorm_forward(bf16* out, float* mean, float* rstd, const bf16* inp, const bf16* weight,
                                  const bf16* bias, int64_t N, int64_t C) {
    extern __shared__ uint4 shared[];
    using Vector = Halves<W>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, vectors = static_cast<int>(C / W);
    const int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
    if (r >= N) return;
    const auto x = reinterpret_cast<const Vector*>(inp + r * C);
    const auto w = reinterpret_cast<const Vector*>(weight), b = reinterpret_cast<const Vector*>(bias);
    const auto y = reinterpret_cast<Vector*>(out + r * C);
    const auto kept = reinterpret_cast<Vector*>(shared) + warp * vectors;
    float sum = 0.0f;
    for (int i = lane; i < vectors; i += kWarp) {
        const Vector v = x[i];
        kept[i] = v;
#pragma unroll
        for (int k = 0; k < W; ++k) sum += to_float(v.v[k]);
    }
    const float m = warp_sum(sum) / static_cast<float>(C);
    float squares = 0.0f;
    for (int i = lane; i < vectors; i += kWarp) {
        const Vector v = kept[i];
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float d = to_float(v.v[k]) - m;
            squares += d * d;
        }
    }
    const float s = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(C) + 1e-5f);
    for (int i = lane; i < vectors; i += kWarp) {
        Vector v = kept[i];
        const Vector scale = w[i], shift = b[i];
#pragma unroll
        for (int k = 0; k < W; ++k)
            v.v[k] = to_bf16((to_float(v.v[k]) - m) * s * to_float(scale.v[k]) + to_float(shift.v[k]));
        y[i] = v;
    }
    if (lane == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

KERNEL void run(bf16* out, float* mean, float* rstd, const bf16* inp, const bf16* weight, const bf16* bias,
                int64_t N, int64_t C) {
    constexpr int rows = 8;
    const auto shared = static_cast<std::size_t>(rows * C) * sizeof(bf16);
    if (C % 8 == 0)
        layernorm_forward<8>
            <<<ceil_div(N, rows), rows * kWarp, shared>>>(out, mean, rstd, inp, weight, bias, N, C);
    else
        layernorm_forward<1>
            <<<ceil_div(N, rows), rows * kWarp, shared>>>(out, mean, rstd, inp, weight, bias, N, C);
}
