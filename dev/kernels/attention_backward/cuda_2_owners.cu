// From lse: a warp for each query, and a warp for each key
//
// delta = sum(dout out) takes the place of the sum over a row, and p is computed again from lse. If one kernel did all, a
// query's warp would have to add to dk and dv of all keys before it, together with other warps: atomics, and another order
// in each run. So there are two kernels, each of which computes p and ds for itself: a warp that owns a query walks
// along its keys and makes dq, a warp that owns a key walks along its queries and makes dk and dv. Two matmuls more, no atomics, the
// same bits in every run.
//
// A warp takes 32 rows at a time. First lane j has row j, for p and ds; then lane c has channels c and c + 32, and the weights come
// from lane to lane by shuffles.
#include "kernel.cuh"

constexpr int HS = 64, kWarps = 4;

__device__ float dot(const float* a, const float* b) {
    float sum = 0;
#pragma unroll 8
    for (int c = 0; c < HS; ++c) sum += a[c] * b[c];
    return sum;
}

__global__ void row_products(float* delta, const float* dout, const float* out, int64_t B, int64_t T,
                             int64_t NH) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= B * NH * T) return;
    const int64_t t = index % T, h = index / T % NH, b = index / (T * NH), at = ((b * T + t) * NH + h) * HS;
    delta[index] = dot(dout + at, out + at);
}

template <bool owns_query>
__global__ void backward(float* dqkv, const float* dout, const float* qkv, const float* lse,
                         const float* delta, int64_t T, int64_t NH, float scale) {
    __shared__ float rows[kWarps][2][HS];  // of what is owned: q and dout, or k and v
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t owned = int64_t(blockIdx.x) * kWarps + warp, h = blockIdx.y % NH, b = blockIdx.y / NH;
    if (owned >= T) return;
    const int64_t C = NH * HS, stride = 3 * C;
    const float *q = qkv + b * T * stride + h * HS, *k = q + C, *v = k + C, *d = dout + b * T * C + h * HS;
    lse += blockIdx.y * T;
    delta += blockIdx.y * T;

    float *first = rows[warp][0], *second = rows[warp][1];
    for (int c = lane; c < HS; c += kWarp) {
        first[c] = owns_query ? q[owned * stride + c] : k[owned * stride + c];
        second[c] = owns_query ? d[owned * C + c] : v[owned * stride + c];
    }
    __syncwarp();
    float sum[2] = {}, sum_v[2] = {};  // dq; or dk, and dv
    const int64_t begin = owns_query ? 0 : owned, end = owns_query ? owned + 1 : T;
    for (int64_t j0 = begin; j0 < end; j0 += kWarp) {
        const int64_t j = j0 + lane;  // a key if the warp owns a query, else a query
        float p = 0, ds = 0;
        if (j < end) {
            const int64_t query = owns_query ? owned : j;
            const float s = dot(first, owns_query ? k + j * stride : q + j * stride);
            const float dp = dot(second, owns_query ? v + j * stride : d + j * C);
            p = expf(s * scale - lse[query]);
            ds = p * (dp - delta[query]) * scale;
        }
        for (int n = 0; n < kWarp; ++n) {
            const float weight = __shfl_sync(kAllLanes, ds, n), weight_v = __shfl_sync(kAllLanes, p, n);
            if (j0 + n >= end) continue;
            for (int half = 0; half < 2; ++half) {
                const int c = lane + half * kWarp;
                sum[half] += weight * (owns_query ? k : q)[(j0 + n) * stride + c];
                if (!owns_query) sum_v[half] += weight_v * d[(j0 + n) * C + c];
            }
        }
    }
    float* to = dqkv + (b * T + owned) * stride + h * HS;
    for (int half = 0; half < 2; ++half) {
        const int c = lane + half * kWarp;
        to[owns_query ? c : C + c] = sum[half];
        if (!owns_query) to[2 * C + c] = sum_v[half];
    }
}

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    float* delta = scratch<float>(B * NH * T);
    const dim3 grid(ceil_div(T, kWarps), B * NH);
    row_products<<<ceil_div(B * NH * T, 128), 128>>>(delta, dout, out, B, T, NH);
    backward<true><<<grid, kWarps * kWarp>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
    backward<false><<<grid, kWarps * kWarp>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
}
