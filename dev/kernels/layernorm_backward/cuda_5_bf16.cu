// Half of the bytes: eight bf16 at a time
//
// As before, with bf16 in memory; a thread owns eight columns and keeps 16 sums. Sums and averages are in f32. At C = 768 a row takes three
// warps.
#include "kernel.cuh"

constexpr int kBlocks = 1056;  // eight on each of an H100's 132 multiprocessors

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int W>
struct alignas(2 * W) Halves {
    bf16 v[W];
};

// partial (blocks, 2, C)
template <int W>
__global__ void layernorm_backward(bf16* dinp, float* partial, const bf16* dout, const bf16* inp,
                                   const bf16* weight, const float* mean, const float* rstd, int64_t N,
                                   int64_t C) {
    // Of this row and of the one before, which a slow warp may still read: so one barrier a row is enough.
    __shared__ float sums[2][2][kWarp];
    using Vector = Halves<W>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int64_t column = static_cast<int64_t>(threadIdx.x) * W;
    const bool live = column < C;
    Vector w = {};
    float dw[W] = {}, db[W] = {};
    if (live) w = *reinterpret_cast<const Vector*>(weight + column);
    int turn = 0;
    for (int64_t r = blockIdx.x; r < N; r += gridDim.x, turn ^= 1) {
        Vector d = {}, x = {}, dx = {};
        if (live) {
            d = *reinterpret_cast<const Vector*>(dout + r * C + column);
            x = *reinterpret_cast<const Vector*>(inp + r * C + column);
            dx = *reinterpret_cast<const Vector*>(dinp + r * C + column);
        }
        const float m = mean[r], s = rstd[r];
        float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float n = (to_float(x.v[k]) - m) * s, g = to_float(d.v[k]) * to_float(w.v[k]);
            dw[k] += to_float(d.v[k]) * n;
            db[k] += to_float(d.v[k]);
            sum_g += g;
            sum_gn += g * n;
        }
        sum_g = warp_sum(sum_g);
        sum_gn = warp_sum(sum_gn);
        if (lane == 0) {
            sums[turn][0][warp] = sum_g;
            sums[turn][1][warp] = sum_gn;
        }
        __syncthreads();
        sum_g = sum_gn = 0.0f;
        for (int i = 0; i < warps; ++i) {
            sum_g += sums[turn][0][i];
            sum_gn += sums[turn][1][i];
        }
        const float avg_g = sum_g / static_cast<float>(C), avg_gn = sum_gn / static_cast<float>(C);
        if (live) {
#pragma unroll
            for (int k = 0; k < W; ++k) {
                const float n = (to_float(x.v[k]) - m) * s, g = to_float(d.v[k]) * to_float(w.v[k]);
                dx.v[k] = to_bf16(to_float(dx.v[k]) + s * (g - avg_g - n * avg_gn));
            }
            *reinterpret_cast<Vector*>(dinp + r * C + column) = dx;
        }
    }
    if (live)
#pragma unroll
        for (int k = 0; k < W; ++k) {
            partial[(2 * blockIdx.x + 0) * C + column + k] = dw[k];
            partial[(2 * blockIdx.x + 1) * C + column + k] = db[k];
        }
}

// A block for 32 columns: warp y adds every 8th block's sums, then the 8 sums are added.
__global__ void add_blocks(float* dweight, float* dbias, const float* partial, int64_t blocks, int64_t C) {
    __shared__ float weights[8][kWarp];
    __shared__ float biases[8][kWarp];
    const int x = threadIdx.x, y = threadIdx.y;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + x;
    float dw = 0.0f, db = 0.0f;
    if (c < C)
        for (int64_t block = y; block < blocks; block += 8) {
            dw += partial[(2 * block + 0) * C + c];
            db += partial[(2 * block + 1) * C + c];
        }
    weights[y][x] = dw;
    biases[y][x] = db;
    __syncthreads();
    if (y > 0 || c >= C) return;
    for (int i = 1; i < 8; ++i) {
        dw += weights[i][x];
        db += biases[i][x];
    }
    dweight[c] += dw;
    dbias[c] += db;
}

KERNEL void run(bf16* dinp, float* dweight, float* dbias, const bf16* dout, const bf16* inp,
                const bf16* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    const int W = C % 8 == 0 ? 8 : 1;
    const int64_t threads = ceil_div(ceil_div(C, W), kWarp) * kWarp, blocks = N < kBlocks ? N : kBlocks;
    if (threads > 1024)
        return note_error("rows of more than 8192 columns, or 1024 if they are no multiple of 8");
    float* const partial = scratch<float>(blocks * 2 * C);
    if (W == 8)
        layernorm_backward<8><<<blocks, threads>>>(dinp, partial, dout, inp, weight, mean, rstd, N, C);
    else
        layernorm_backward<1><<<blocks, threads>>>(dinp, partial, dout, inp, weight, mean, rstd, N, C);
    add_blocks<<<ceil_div(C, kWarp), dim3(kWarp, 8)>>>(dweight, dbias, partial, blocks, C);
}
