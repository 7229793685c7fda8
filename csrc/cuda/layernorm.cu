// layernorm, alone and fused with the residual addition before it. One warp per row. A row is read from
// memory once: it waits in shared memory, as it was stored, for its mean, its variance and its output; a lane
// reads back only what it wrote, so no barrier is needed. Rows too long for that are read from memory again.
//
// Backward is two kernels: the input's gradient, one warp per row; and the parameters', which are sums over
// all rows (column_sum.cuh).
#include "core/dims.h"
#include "cuda/column_sum.cuh"
#include "cuda/cuda_backend.h"

namespace llmc {

namespace {

constexpr float kEps = 1e-5f;
constexpr int kWarps = 8;               // rows of a block
constexpr i64 kSharedBytes = 48 << 10;  // what a block gets without asking

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
        Floats<W> v = load<W>(a + row * C + c);
        if constexpr (fused) {
            const Floats<W> v2 = load<W>(b + row * C + c);
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] = as_stored<T>(v[k] + v2[k]);
            store(residual + row * C + c, v);
        }
        if (keep) store(kept + c, v);
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

template <class T, bool fused>
void launch_forward(cudaStream_t stream, Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a,
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
            launch(layernorm_forward_kernel<T, W, fused>, blocks_for(N, rows), rows * kWarp, shared, stream,
                   residual.as<T>(), out.as<T>(), mean.as<float>(), rstd.as<float>(), a.as<T>(), b.as<T>(),
                   weight.as<T>(), bias.as<T>(), N, C, keep);
        },
        residual.data, out.data, a.data, b.data, weight.data, bias.data);
}

// With n = (x - mean) rstd and g = dout w:  dinp += rstd (g - avg(g) - n avg(g n))
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

// dweight += sum dout n;   dbias += sum dout
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
    const auto [N, C] = layernorm_dims("layernorm_forward", out, mean, rstd, inp, weight);
    detail::check_like("layernorm_forward", "bias", bias, weight);
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        launch_forward<decltype(tag), false>(stream(), Tensor(), out, mean, rstd, inp, Tensor(), weight, bias,
                                             N, C);
    });
}

void CudaBackend::fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd,
                                                   Tensor a, Tensor b, Tensor weight, Tensor bias) {
    constexpr const char* op = "fused_residual_layernorm_forward";
    const auto [N, C] = layernorm_dims(op, out, mean, rstd, residual, weight);
    detail::check_like(op, "bias", bias, weight);
    elementwise_numel(op, residual, a, b);
    visit_float(a.dtype, [&, N = N, C = C](auto tag) {
        launch_forward<decltype(tag), true>(stream(), residual, out, mean, rstd, a, b, weight, bias, N, C);
    });
}

void CudaBackend::layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                     Tensor weight, Tensor mean, Tensor rstd) {
    constexpr const char* op = "layernorm_backward";
    const auto [N, C] = layernorm_dims(op, dinp, mean, rstd, inp, weight);
    detail::check_matrix(op, "dout", dout, inp.dtype, N, C);
    detail::check_shape(op, "dweight", dweight, {C});
    detail::check_float(op, "dweight", dweight);
    detail::check_like(op, "dbias", dbias, dweight);
    float* const partial = static_cast<float*>(scratch(column_sum_scratch<2>(N, C)));
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            C,
            [&](auto width) {
                constexpr int W = decltype(width)::value;
                launch(layernorm_input_gradient_kernel<T, W>, blocks_for(N, kWarps), kWarps * kWarp, 0,
                       stream(), dinp.as<T>(), dout.as<T>(), inp.as<T>(), weight.as<T>(), mean.as<float>(),
                       rstd.as<float>(), N, C);
            },
            dinp.data, dout.data, inp.data, weight.data);
        visit_float(dweight.dtype, [&](auto grad_tag) {
            using G = decltype(grad_tag);
            launch_column_sum<T, 2>(
                stream(), dweight.as<G>(), dbias.as<G>(), partial, N, C, true,
                ParameterTerms<T>{dout.as<T>(), inp.as<T>(), mean.as<float>(), rstd.as<float>(), C},
                dout.data, inp.data);
        });
    });
}

}  // namespace llmc
