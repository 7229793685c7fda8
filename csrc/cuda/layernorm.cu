// layernorm, alone and fused with the residual addition before it. One warp per row. A row is read from
// memory once: it waits in shared memory, as it was stored, for its mean, its variance and its output; a lane
// reads back only what it wrote, so no barrier is needed. Rows too long for that are read from memory again.
//
// Backward reads everything once, too: a row waits in the registers of the 1 to 8 warps that share it, and each
// lane adds up the parameters' gradients of its columns over all rows that its block takes. So it does with the sums
// of the input's gradient, if they are wanted, but in shared memory: registers have no room left. The blocks' sums
// are added by a second kernel, in order. Rows too long for registers go the longer way: one kernel for the
// input's gradient, and sums over rows (column_sum.cuh) for the rest.
#include "core/dims.h"
#include "cuda/column_sum.cuh"
#include "cuda/cuda_backend.h"

namespace llmc {

namespace {

constexpr float kEps = 1e-5f;
constexpr int kWarps = 8;               // rows of a block
constexpr i64 kSharedBytes = 48 << 10;  // what a block gets without asking

// What is normalised: W elements of a, or if fused of a + b, which is stored as the residual and rounded as a later reader
// will see it.
template <int W, bool fused, class T>
__device__ __forceinline__ Packed<W, T> load_input(T* residual, const T* a, const T* b, i64 at) {
    Packed<W, T> packed = load_packed<W>(a + at);
    if constexpr (fused) {
        Floats<W> v = packed.floats();
        const Floats<W> v2 = load<W>(b + at);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] += v2[k];
        packed = Packed<W, T>::of(v);
        packed.store(residual + at);
    }
    return packed;
}

template <class T, int W, bool fused>
__global__ void layernorm_forward_kernel(T* residual, T* out, float* mean, float* rstd, const T* a,
                                         const T* b, const T* weight, const T* bias, i64 N, i64 C,
                                         bool keep) {
    LLMC_DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const i64 row = static_cast<i64>(blockIdx.x) * (blockDim.x / kWarp) + warp;
    if (row >= N) return;
    T* const kept = reinterpret_cast<T*>(shared) + warp * C;
    // x, the normalised row, is read again below: from shared memory or from where it lies.
    const T* x = keep ? kept : fused ? residual + row * C : a + row * C;
    float sum = 0.0f;
    for (i64 c = lane * W; c < C; c += kWarp * W) {
        const Packed<W, T> packed = load_input<W, fused>(residual, a, b, row * C + c);
        const Floats<W> v = packed.floats();
        if (keep) packed.store(kept + c);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += v[k];
    }
    const float mu = warp_reduce(sum, Sum()) / static_cast<float>(C);
    float squares = 0.0f;
    for (i64 c = lane * W; c < C; c += kWarp * W) {
        const Floats<W> v = load<W>(x + c);
#pragma unroll
        for (int k = 0; k < W; ++k) squares += (v[k] - mu) * (v[k] - mu);
    }
    const float variance = warp_reduce(squares, Sum()) / static_cast<float>(C);
    const float rs = 1.0f / sqrtf(variance + kEps);
    for (i64 c = lane * W; c < C; c += kWarp * W) {
        Floats<W> v = load<W>(x + c);
        const Floats<W> w = load<W>(weight + c), o = load<W>(bias + c);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = fmaf((v[k] - mu) * rs, w[k], o[k]);
        store(out + row * C + c, v);
    }
    if (lane == 0) {
        mean[row] = mu;
        rstd[row] = rs;
    }
}

// The same for few rows: a block takes a row, and a thread W columns of it.
template <class T, int W, bool fused>
__global__ void layernorm_few_rows_kernel(T* residual, T* out, float* mean, float* rstd, const T* a,
                                          const T* b, const T* weight, const T* bias, int C) {
    const i64 row = blockIdx.x;
    const int c = static_cast<int>(threadIdx.x) * W;
    const bool live = c < C;
    if (live) {
        ptx::prefetch(weight + c);
        ptx::prefetch(bias + c);
    }
    overlap_kernels();
    Floats<W> v = zeros<W>();
    Packed<W, T> w{}, o{};
    if (live) {
        w.load(weight + c);
        o.load(bias + c);
        v = load_input<W, fused>(residual, a, b, row * C + c).floats();
    }
    // As block_reduce, for few warps.
    LLMC_SHARED(partial, float[2][kWarp]);
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const auto block_sum = [&](float x, int which) {
        x = warp_reduce(x, Sum());
        if (threadIdx.x % kWarp == 0) partial[which][threadIdx.x / kWarp] = x;
        __syncthreads();
        float all = 0.0f;
        for (int w = 0; w < warps; ++w) all += partial[which][w];
        return all;
    };
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < W; ++k) sum += v[k];
    const float mu = block_sum(sum, 0) / static_cast<float>(C);
    float squares = 0.0f;
    if (live)
#pragma unroll
        for (int k = 0; k < W; ++k) squares += (v[k] - mu) * (v[k] - mu);
    const float variance = block_sum(squares, 1) / static_cast<float>(C);
    const float rs = 1.0f / sqrtf(variance + kEps);
    if (live) {
        const Floats<W> scale = w.floats(), shift = o.floats();
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = fmaf((v[k] - mu) * rs, scale[k], shift[k]);
        store(out + row * C + c, v);
    }
    if (threadIdx.x == 0) {
        mean[row] = mu;
        rstd[row] = rs;
    }
}

template <class T, bool fused>
void launch_forward(CudaBackend& backend, Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a,
                    Tensor b, Tensor weight, Tensor bias, i64 N, i64 C) {
    const i64 row_bytes = C * static_cast<i64>(sizeof(T));
    const bool keep = row_bytes <= kSharedBytes;
    const i64 fit = keep && row_bytes > 0 ? kSharedBytes / row_bytes : kWarps;
    const int rows = static_cast<int>(fit < kWarps ? fit : kWarps);
    const std::size_t shared = keep ? static_cast<std::size_t>(rows * row_bytes) : 0;
    visit_width<T>(
        C,
        [&](auto width) {
            constexpr int W = decltype(width)::value;
            const i64 threads = ceil_div(ceil_div(C, W), kWarp) * kWarp;
            if (N > 0 && N <= kFewRows && threads <= 1024)
                return launch(layernorm_few_rows_kernel<T, W, fused>, blocks_for(N, 1),
                              static_cast<unsigned>(threads), 0,
                              backend.overlapping_stream({residual, out, mean, rstd}), residual.as<T>(),
                              out.as<T>(), mean.as<float>(), rstd.as<float>(), a.as<T>(), b.as<T>(),
                              weight.as<T>(), bias.as<T>(), static_cast<int>(C));
            launch(layernorm_forward_kernel<T, W, fused>, blocks_for(N, rows), rows * kWarp, shared,
                   backend.stream(), residual.as<T>(), out.as<T>(), mean.as<float>(), rstd.as<float>(),
                   a.as<T>(), b.as<T>(), weight.as<T>(), bias.as<T>(), N, C, keep);
        },
        residual.data, out.data, a.data, b.data, weight.data, bias.data);
}

// Two blocks on each of an H100's 132 multiprocessors. Not the number of the GPU that is here: the same bits
// come from every GPU.
constexpr int kBackwardBlocks = 264;
constexpr int kMostVectors = 3;  // of a row, in the registers of a lane

// How rows of C columns are shared out: `warps` to a row, each lane has `vectors` times W columns. 0 vectors:
// the row is too long.
struct RowShare {
    int warps, vectors;
};
RowShare row_share(i64 C, int W) {
    for (int warps = 1; warps <= kWarps; warps *= 2)
        if (const i64 vectors = ceil_div(C, warps * kWarp * W); vectors <= kMostVectors)
            return {warps, static_cast<int>(vectors)};
    return {0, 0};
}

// With n = (x - mean) rstd and g = dout w:
//   dinp += rstd (g - avg(g) - n avg(g n));   dweight += sum dout n;   dbias += sum dout
// partial (blocks, K, C): the block's dweight, dbias and, if K is 3, dinp_sum.
template <class T, int W, int V, int K>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    layernorm_backward_kernel(T* dinp, float* partial, const T* dout, const T* inp, const T* weight,
                              const float* mean, const float* rstd, i64 N, int C, int row_warps) {
    LLMC_SHARED(row_sums, float[2][2][kWarps]);  // of the rows of this turn and of the one before
    LLMC_SHARED(shared, float[kWarps][kWarp * W]);
    // The warp's dinp_sum: 16 bytes of a lane beside those of the next, so that no two lanes meet in a bank.
    constexpr int Q = W % 4 == 0 ? 4 : 1;
    LLMC_SHARED(dinp_sums, float[K == 3 ? kWarps : 1][V * W / Q][kWarp][Q]);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int rows = kWarps / row_warps, row_in_block = warp / row_warps, part = warp % row_warps;
    const int column0 = (part * kWarp + lane) * W, step = row_warps * kWarp * W;
    const float share = 1.0f / static_cast<float>(C);
    Packed<W, T> w[V] = {};
    Floats<W> dweight[V], dbias[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (column0 + v * step < C) w[v] = load_packed<W>(weight + column0 + v * step);
        dweight[v] = dbias[v] = zeros<W>();
    }
    if constexpr (K == 3)
#pragma unroll
        for (int i = 0; i < V * W / Q; ++i) store(dinp_sums[warp][i][lane], zeros<Q>());
    int turn = 0;
    for (i64 row0 = static_cast<i64>(blockIdx.x) * rows; row0 < N;
         row0 += static_cast<i64>(gridDim.x) * rows, turn ^= 1) {
        const bool live = row0 + row_in_block < N;  // rows past the end are taken as 0, and add nothing
        const i64 row = live ? row0 + row_in_block : row0, begin = row * C + column0;
        const T *const from_x = inp + begin, *const from_d = dout + begin;
        T* const to = dinp + begin;
        Packed<W, T> x[V] = {}, d[V] = {}, old[V] = {};
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (live && column0 + v * step < C) {
                x[v] = load_packed<W>(from_x + v * step);
                d[v] = load_packed<W>(from_d + v * step);
                old[v] = load_packed<W>(to + v * step);
            }
        const float mu = mean[row], rs = rstd[row];
        float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            w[v].forget();
            const Floats<W> xs = x[v].floats(), ds = d[v].floats(), ws = w[v].floats();
#pragma unroll
            for (int k = 0; k < W; ++k) {
                const float n = (xs[k] - mu) * rs, g = ds[k] * ws[k];
                sum_g += g;
                sum_gn = fmaf(g, n, sum_gn);
                dweight[v][k] = fmaf(ds[k], n, dweight[v][k]);
                dbias[v][k] += ds[k];
            }
        }
        sum_g = warp_reduce(sum_g, Sum());
        sum_gn = warp_reduce(sum_gn, Sum());
        if (row_warps > 1) {
            if (lane == 0) row_sums[turn][0][warp] = sum_g, row_sums[turn][1][warp] = sum_gn;
            __syncthreads();
            sum_g = sum_gn = 0.0f;
            for (int i = warp - part; i < warp - part + row_warps; ++i)
                sum_g += row_sums[turn][0][i], sum_gn += row_sums[turn][1][i];
        }
        const float avg_g = sum_g * share, avg_gn = sum_gn * share;
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (live && column0 + v * step < C) {
                x[v].forget(), d[v].forget(), w[v].forget();
                const Floats<W> xs = x[v].floats(), ds = d[v].floats(), ws = w[v].floats();
                Floats<W> g = old[v].floats();
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    const float n = (xs[k] - mu) * rs;
                    g[k] = fmaf(rs, ds[k] * ws[k] - avg_g - n * avg_gn, g[k]);
                }
                const Packed<W, T> stored = Packed<W, T>::of(g);
                stored.store(to + v * step);
                if constexpr (K == 3) {
                    g = stored.floats();  // rounded, as the matmuls below see it
#pragma unroll
                    for (int i = 0; i < W / Q; ++i) {
                        float* const at = dinp_sums[warp][v * W / Q + i][lane];
                        Floats<Q> sum = load<Q>(at);
#pragma unroll
                        for (int q = 0; q < Q; ++q) sum[q] += g[i * Q + q];
                        store(at, sum);
                    }
                }
            }
    }
    float* const block_sums = partial + static_cast<i64>(blockIdx.x) * K * C;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
        for (int p = 0; p < K; ++p) {
            __syncthreads();
#pragma unroll
            for (int k = 0; k < W; ++k)
                shared[warp][k * kWarp + lane] = p == 0   ? dweight[v][k]
                                                 : p == 1 ? dbias[v][k]
                                                          : dinp_sums[warp][(v * W + k) / Q][lane][k % Q];
            __syncthreads();
            // Each of the warps with the same columns finishes some of them.
            const int column = column0 + v * step;
            for (int k = row_in_block; k < W; k += rows) {
                float total = 0.0f;
                for (int i = part; i < kWarps; i += row_warps) total += shared[i][k * kWarp + lane];
                if (column < C) block_sums[p * C + column + k] = total;
            }
        }
}

// For rows that do not fit into registers: only dinp.
template <class T, int W>
__global__ void layernorm_input_gradient_kernel(T* dinp, const T* dout, const T* inp, const T* weight,
                                                const float* mean, const float* rstd, i64 N, i64 C) {
    const int lane = threadIdx.x % kWarp;
    const i64 row = global_thread() / kWarp;
    if (row >= N) return;
    const T *const x = inp + row * C, *const dy = dout + row * C;
    T* const dx = dinp + row * C;
    const float mu = mean[row], rs = rstd[row];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (i64 c = lane * W; c < C; c += kWarp * W) {
        const Floats<W> v = load<W>(x + c), d = load<W>(dy + c), w = load<W>(weight + c);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float g = d[k] * w[k];
            sum_g += g;
            sum_gn = fmaf(g, (v[k] - mu) * rs, sum_gn);
        }
    }
    const float avg_g = warp_reduce(sum_g, Sum()) / static_cast<float>(C);
    const float avg_gn = warp_reduce(sum_gn, Sum()) / static_cast<float>(C);
    for (i64 c = lane * W; c < C; c += kWarp * W) {  // the row is in the L1 cache now
        const Floats<W> v = load<W>(x + c), d = load<W>(dy + c), w = load<W>(weight + c);
        Floats<W> g = load<W>(dx + c);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float n = (v[k] - mu) * rs;
            g[k] = fmaf(rs, d[k] * w[k] - avg_g - n * avg_gn, g[k]);
        }
        store(dx + c, g);
    }
}

// For those rows: dweight and dbias (column_sum.cuh).
template <class T>
struct ParameterTerms {
    const T *dout, *inp;
    const float *mean, *rstd;
    i64 C;
    template <int W>
    __device__ void add(Floats<W> (&sums)[2], i64 row, i64 column) const {
        const Floats<W> d = load<W>(dout + row * C + column), x = load<W>(inp + row * C + column);
        const float mu = mean[row], rs = rstd[row];
#pragma unroll
        for (int k = 0; k < W; ++k) {
            sums[0][k] = fmaf(d[k], (x[k] - mu) * rs, sums[0][k]);
            sums[1][k] += d[k];
        }
    }
};

}  // namespace

void CudaBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                                    Tensor bias) {
    const auto [N, C] = layernorm_forward_dims("layernorm_forward", out, mean, rstd, inp, weight, bias);
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        launch_forward<decltype(tag), false>(*this, Tensor(), out, mean, rstd, inp, Tensor(), weight, bias, N,
                                             C);
    });
}

void CudaBackend::fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd,
                                                   Tensor a, Tensor b, Tensor weight, Tensor bias) {
    const auto [N, C] = fused_residual_layernorm_forward_dims(residual, out, mean, rstd, a, b, weight, bias);
    visit_float(a.dtype, [&, N = N, C = C](auto tag) {
        launch_forward<decltype(tag), true>(*this, residual, out, mean, rstd, a, b, weight, bias, N, C);
    });
}

void CudaBackend::layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dinp_sum, Tensor dout,
                                     Tensor inp, Tensor weight, Tensor mean, Tensor rstd) {
    const auto [N, C] =
        layernorm_backward_dims(dinp, dweight, dbias, dinp_sum, dout, inp, weight, mean, rstd);
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        using T = decltype(tag);
        visit_float(dweight.dtype, [&](auto grad_tag) {
            using G = decltype(grad_tag);
            visit_width<T>(
                C,
                [&](auto width) {
                    constexpr int W = decltype(width)::value;
                    const RowShare share = row_share(C, W);
                    const SumOutputs<G> outputs{dweight.as<G>(), dbias.as<G>(), dinp_sum.as<G>()};
                    if (share.vectors == 0) {
                        launch(layernorm_input_gradient_kernel<T, W>, blocks_for(N, kWarps), kWarps * kWarp,
                               0, stream(), dinp.as<T>(), dout.as<T>(), inp.as<T>(), weight.as<T>(),
                               mean.as<float>(), rstd.as<float>(), N, C);
                        float* const partial = static_cast<float*>(scratch(column_sum_scratch<2>(N, C)));
                        launch_column_sum<T, 2>(stream(), outputs, partial, N, C, true,
                                                ParameterTerms<T>{dout.as<T>(), inp.as<T>(), mean.as<float>(),
                                                                  rstd.as<float>(), C},
                                                dout.data, inp.data);
                        if (dinp_sum) bias_gradient(dinp_sum, dinp, true);
                        return;
                    }
                    const i64 needed = ceil_div(N * share.warps, kWarps);
                    const i64 blocks = needed < kBackwardBlocks ? needed : kBackwardBlocks;
                    const auto by_rows = [&](auto sums) {
                        constexpr int K = decltype(sums)::value;
                        float* const partial = static_cast<float*>(scratch(blocks * K * C * 4));
                        launch(share.vectors == kMostVectors
                                   ? layernorm_backward_kernel<T, W, kMostVectors, K>
                                   : layernorm_backward_kernel<T, W, kMostVectors - 1, K>,
                               blocks_for(blocks, 1), kWarps * kWarp, 0, stream(), dinp.as<T>(), partial,
                               dout.as<T>(), inp.as<T>(), weight.as<T>(), mean.as<float>(), rstd.as<float>(),
                               N, static_cast<int>(C), share.warps);
                        launch_add_pieces<K>(stream(), outputs, partial, blocks, C, true);
                    };
                    if (dinp_sum)
                        by_rows(std::integral_constant<int, 3>{});
                    else
                        by_rows(std::integral_constant<int, 2>{});
                },
                dinp.data, dout.data, inp.data, weight.data);
        });
    });
}

}  // namespace llmc
