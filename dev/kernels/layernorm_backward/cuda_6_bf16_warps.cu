// A warp per row, no barrier: the row in the registers of its lanes
//
// A block of three warps that share a row waits at a barrier once for each row, and the memory waits with it. If a lane owns three times
// eight columns, a row of 768 is one warp's alone: warps go their own ways, and while one adds up its averages, others load. The price is
// 48 sums in registers, beside the row as it was stored; two blocks of 8 warps fit on a multiprocessor. Rows of more columns
// would need several warps again, as in csrc/cuda/layernorm.cu, which does this.
#include "kernel.cuh"

constexpr int kWarps = 8;
constexpr int kBlocks = 264;  // two on each of an H100's 132 multiprocessors

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int W>
struct alignas(2 * W) Halves {
    bf16 v[W];
};

// The compiler would rather keep 8 floats than make them from 4 registers again. This makes it forget that it has them.
template <int W>
__device__ void forget(Halves<W>& x) {
    if constexpr (W == 1) {
        llmc::ptx::forget(x.v[0].bits);
    } else {
        auto& words = reinterpret_cast<std::uint32_t (&)[W / 2]>(x);
#pragma unroll
        for (std::uint32_t& word : words) llmc::ptx::forget(word);
    }
}

// partial (blocks, 2, C). Lane l owns the columns (32 v + l) W .. + W - 1 for v below V.
template <int W, int V>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    layernorm_backward(bf16* dinp, float* partial, const bf16* dout, const bf16* inp, const bf16* weight,
                       const float* mean, const float* rstd, int64_t N, int C) {
    __shared__ float shared[kWarps][kWarp * W];
    using Vector = Halves<W>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Vector w[V] = {};
    float sums[2][V][W] = {};  // dweight, dbias
#pragma unroll
    for (int v = 0; v < V; ++v)
        if (const int c = (v * kWarp + lane) * W; c < C) w[v] = *reinterpret_cast<const Vector*>(weight + c);
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp; r < N; r += gridDim.x * kWarps) {
        Vector d[V] = {}, x[V] = {}, dx[V] = {};
        bf16* const to = dinp + r * C;
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (const int c = (v * kWarp + lane) * W; c < C) {
                d[v] = *reinterpret_cast<const Vector*>(dout + r * C + c);
                x[v] = *reinterpret_cast<const Vector*>(inp + r * C + c);
                dx[v] = *reinterpret_cast<const Vector*>(to + c);
            }
        const float m = mean[r], s = rstd[r];
        float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            forget(w[v]);
#pragma unroll
            for (int k = 0; k < W; ++k) {
                const float dy = to_float(d[v].v[k]), n = (to_float(x[v].v[k]) - m) * s;
                const float g = dy * to_float(w[v].v[k]);
                sum_g += g;
                sum_gn += g * n;
                sums[0][v][k] += dy * n;
                sums[1][v][k] += dy;
            }
        }
        const float avg_g = warp_sum(sum_g) / static_cast<float>(C),
                    avg_gn = warp_sum(sum_gn) / static_cast<float>(C);
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (const int c = (v * kWarp + lane) * W; c < C) {
                forget(d[v]), forget(x[v]), forget(dx[v]), forget(w[v]);
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    const float n = (to_float(x[v].v[k]) - m) * s,
                                g = to_float(d[v].v[k]) * to_float(w[v].v[k]);
                    dx[v].v[k] = to_bf16(to_float(dx[v].v[k]) + s * (g - avg_g - n * avg_gn));
                }
                *reinterpret_cast<Vector*>(to + c) = dx[v];
            }
    }
    // The block's sums are those of its warps, in their order.
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            __syncthreads();
#pragma unroll
            for (int k = 0; k < W; ++k) shared[warp][k * kWarp + lane] = sums[p][v][k];
            __syncthreads();
            for (int k = warp; k < W; k += kWarps) {
                float total = 0.0f;
                for (int i = 0; i < kWarps; ++i) total += shared[i][k * kWarp + lane];
                const int c = (v * kWarp + lane) * W + k;
                if (c < C) partial[(2 * blockIdx.x + p) * static_cast<int64_t>(C) + c] = total;
            }
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
    const int64_t blocks = ceil_div(N, kWarps) < kBlocks ? ceil_div(N, kWarps) : kBlocks;
    const int64_t width = C % 8 == 0 ? 8 : 1, vectors = ceil_div(C, kWarp * width);
    float* const partial = scratch<float>(blocks * 2 * C);
    const auto launch = [&](auto kernel) {
        kernel<<<blocks, kWarps * kWarp>>>(dinp, partial, dout, inp, weight, mean, rstd, N,
                                           static_cast<int>(C));
    };
    if (vectors > 3) return note_error("rows of more than 768 columns, or 96 if they are no multiple of 8");
    if (width == 8)
        vectors == 1   ? launch(layernorm_backward<8, 1>)
        : vectors == 2 ? launch(layernorm_backward<8, 2>)
                       : launch(layernorm_backward<8, 3>);
    else
        launch(layernorm_backward<1, 3>);
    add_blocks<<<ceil_div(C, kWarp), dim3(kWarp, 8)>>>(dweight, dbias, partial, blocks, C);
}
