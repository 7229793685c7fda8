// AdamW with gradient clipping, the master weight and the rounding to bf16 in one pass: each of param, grad, m
// and v is touched once, and one launch takes many parameters. Bound by memory bandwidth. The clip factor is read
// here, on the device: the host does not wait for the norm.
#include "core/dims.h"
#include "cuda/batch.cuh"
#include "cuda/cuda_backend.h"
#include "cuda/weights.cuh"

namespace llmc {

namespace {

template <class P, class G>
struct Operands {
    P* param;
    std::int16_t* master;
    float *m, *v;
    const G* grad;
    i64 n;
    float weight_decay;
    std::uint32_t seed, first;
};
constexpr int kBatch = 48, kThreads = 256, kTurns = 4;

template <class P, class G, Rounding rounding>
struct Update {
    Batch<Operands<P, G>, kBatch> batch;
    const float* factor;
    float lr, beta1, beta2, eps;
    float inv_correction1, inv_correction2;  // 1 / correction

    template <int W>
    __device__ __forceinline__ void at(const Operands<P, G>& o, float f, i64 i) const {
        const Floats<W> g = load<W>(o.grad + i);
        Floats<W> m1 = load<W>(o.m + i), v1 = load<W>(o.v + i);
        Floats<W> p = load_weights<W, rounding>(o.param, o.master, i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float gk = g[k] * f;
            m1[k] = interpolate(gk, m1[k], beta1);
            v1[k] = interpolate(gk * gk, v1[k], beta2);
            const float direction = (m1[k] * inv_correction1) / (sqrtf(v1[k] * inv_correction2) + eps);
            p[k] = fmaf(-lr, fmaf(o.weight_decay, p[k], direction), p[k]);
        }
        store(o.m + i, m1);
        store(o.v + i, v1);
        store_weights<rounding>(o.param, o.master, i, p, o.first, o.seed);
    }
};

template <class... Pointers>
__device__ __forceinline__ bool aligned(Pointers... pointers) {
    return (... | reinterpret_cast<std::uintptr_t>(pointers)) % 16 == 0;
}

template <int W, class P, class G, Rounding rounding>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Update<P, G, rounding> update) {
    const float f = *update.factor;
    if (!is_finite(f)) return;  // no update
    const auto [item, block] = update.batch.place(blockIdx.x);
    const Operands<P, G>& o = update.batch.items[item];
    const Part part =
        part_of<W>(o.n, block, kThreads * W * kTurns, aligned(o.param, o.master, o.m, o.v, o.grad));
#pragma unroll 1
    for (i64 i = part.begin + threadIdx.x * W; i < part.middle; i += kThreads * W)
        update.template at<W>(o, f, i);
#pragma unroll 1
    for (i64 i = part.middle + threadIdx.x; i < part.end; i += kThreads) update.template at<1>(o, f, i);
}

}  // namespace

void CudaBackend::adamw_many(std::span<const AdamWOperands> operands, Tensor factor, const AdamWStep& step) {
    adamw_many_dims(operands, factor);
    const auto run = [&](auto p, auto g, auto rounding) {
        using P = decltype(p);
        using G = decltype(g);
        using All = Update<P, G, decltype(rounding)::value>;
        constexpr int W = 16 / sizeof(P);
        const auto launch_batch = [&](const Batch<Operands<P, G>, kBatch>& batch) {
            launch(adamw_kernel<W, P, G, decltype(rounding)::value>, batch.blocks(), kThreads, 0, stream(),
                   All{batch, factor.as<float>(), step.lr, step.beta1, step.beta2, step.eps,
                       1.0f / step.correction1, 1.0f / step.correction2});
        };
        static_assert(sizeof(All) <= 4096);
        Batches<Operands<P, G>, kBatch, decltype(launch_batch)> batches(launch_batch);
        for (const AdamWOperands& o : operands) {
            const Rounding wanted = o.param.dtype == DType::f32 ? Rounding::none
                                    : o.master                  ? Rounding::split
                                                                : Rounding::stochastic;
            if (wanted != decltype(rounding)::value || size_of(o.grad.dtype) != sizeof(G)) continue;
            batches.add({o.param.as<P>(), o.master.as<std::int16_t>(), o.m.as<float>(), o.v.as<float>(),
                         o.grad.as<G>(), o.param.numel(), o.weight_decay, o.seed,
                         static_cast<std::uint32_t>(o.first)},
                        blocks_for(o.param.numel(), kThreads * W * kTurns));
        }
        batches.flush();
    };
    run(float{}, float{}, std::integral_constant<Rounding, Rounding::none>{});
    for (const DType grad : {DType::f32, DType::bf16})
        visit_float(grad, [&](auto g) {
            run(bf16{}, g, std::integral_constant<Rounding, Rounding::split>{});
            run(bf16{}, g, std::integral_constant<Rounding, Rounding::stochastic>{});
        });
}

}  // namespace llmc
