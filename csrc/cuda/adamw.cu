// AdamW with gradient clipping, the master weight and the rounding to bf16 in one pass: each of param, grad, m
// and v is touched once, and one launch takes many parameters. Bound by memory bandwidth. The clip factor is read
// here, on the device: the host does not wait for the norm.
#include <limits>

#include "core/dims.h"
#include "cuda/batch.cuh"
#include "cuda/cuda_backend.h"

namespace llmc {

namespace {

// llm.c's lerp: start + weight (end - start), as two fused multiply-adds.
__device__ float lerp(float start, float end, float weight) {
    return fmaf(weight, end, fmaf(-weight, start, start));
}

// SquirrelNoise5 (Squirrel Eiserloh, eiserloh.net/noise/SquirrelNoise5.hpp, CC BY 3.0 US): a hash of an index and a
// seed that passes for random bits.
__device__ std::uint32_t squirrel_noise5(std::uint32_t index, std::uint32_t seed) {
    std::uint32_t x = index * 0xd2a80a3fu + seed;
    x ^= x >> 9;
    x += 0xa884f197u;
    x ^= x >> 11;
    x *= 0x6c736f4bu;
    x ^= x >> 13;
    x += 0xb79f3abbu;
    x ^= x >> 15;
    x += 0x1b56c4f5u;
    x ^= x >> 17;
    return x;
}

enum class Rounding { none, stochastic, split };  // f32; bf16 alone; bf16 with its lower half as master

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
        Floats<W> m1 = load<W>(o.m + i), v1 = load<W>(o.v + i), p;
        Packed<W, P> p_words;
        Packed<W, std::int16_t> low_words;
        p_words.load(o.param + i);
        P* const upper = reinterpret_cast<P*>(p_words.words);
        std::int16_t* const lower = reinterpret_cast<std::int16_t*>(low_words.words);
        if constexpr (rounding == Rounding::split) {  // join_master of core/master.h
            low_words.load(o.master + i);
#pragma unroll
            for (int k = 0; k < W; ++k)
                p[k] = __uint_as_float((static_cast<std::uint32_t>(upper[k].bits) << 16) +
                                       static_cast<std::uint32_t>(static_cast<std::int32_t>(lower[k])));
        } else {
#pragma unroll
            for (int k = 0; k < W; ++k) p[k] = widen(upper[k]);
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float gk = g[k] * f;
            m1[k] = lerp(gk, m1[k], beta1);
            v1[k] = lerp(gk * gk, v1[k], beta2);
            const float direction = (m1[k] * inv_correction1) / (sqrtf(v1[k] * inv_correction2) + eps);
            p[k] = fmaf(-lr, fmaf(o.weight_decay, p[k], direction), p[k]);
        }
        store(o.m + i, m1);
        store(o.v + i, v1);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const std::uint32_t u = __float_as_uint(p[k]);
            if constexpr (rounding == Rounding::none) {
                upper[k] = p[k];
            } else if constexpr (rounding == Rounding::split) {  // split_master of core/master.h
                const std::uint32_t rounded = (u + 0x8000u) >> 16;
                upper[k].bits = static_cast<std::uint16_t>(rounded);
                lower[k] = static_cast<std::int16_t>(static_cast<std::uint16_t>(u - (rounded << 16)));
            } else {
                // Up with the probability of the part that is cut off: small updates are not lost on average.
                const std::uint32_t threshold =
                    squirrel_noise5(o.first + static_cast<std::uint32_t>(i + k), o.seed) & 0xffffu;
                upper[k].bits =
                    static_cast<std::uint16_t>((u + ((u & 0xffffu) > threshold ? 0x10000u : 0u)) >> 16);
            }
        }
        p_words.store(o.param + i);
        if constexpr (rounding == Rounding::split) low_words.store(o.master + i);
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
    if (!(fabsf(f) <= std::numeric_limits<float>::max())) return;  // the norm was not finite: no update
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
