// AdamW with gradient clipping, the master weight and the rounding to bf16 in one pass: each of param, grad, m
// and v is touched once. Bound by memory bandwidth. The clip factor is read here, on the device: the host does
// not wait for the norm.
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"

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

template <class P, class G, Rounding rounding>
struct Update {
    P* param;
    std::int16_t* master;
    float *m, *v;
    const G* grad;
    const float* factor;
    AdamWStep step;
    float inv_correction1, inv_correction2;  // 1 / correction

    template <int W>
    __device__ void at(i64 i) const {
        const float f = *factor;
        if (!(fabsf(f) <= std::numeric_limits<float>::max())) return;  // the norm was not finite: no update
        const Floats<W> g = load<W>(grad + i);
        Floats<W> m1 = load<W>(m + i), v1 = load<W>(v + i), p;
        Packed<W, P> p_words;
        Packed<W, std::int16_t> low_words;
        p_words.load(param + i);
        P* const upper = reinterpret_cast<P*>(p_words.words);
        std::int16_t* const lower = reinterpret_cast<std::int16_t*>(low_words.words);
        if constexpr (rounding == Rounding::split) {  // join_master of core/master.h
            low_words.load(master + i);
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
            m1[k] = lerp(gk, m1[k], step.beta1);
            v1[k] = lerp(gk * gk, v1[k], step.beta2);
            const float direction = (m1[k] * inv_correction1) / (sqrtf(v1[k] * inv_correction2) + step.eps);
            p[k] = fmaf(-step.lr, fmaf(step.weight_decay, p[k], direction), p[k]);
        }
        store(m + i, m1);
        store(v + i, v1);
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
                    squirrel_noise5(static_cast<std::uint32_t>(step.first + i + k), step.seed) & 0xffffu;
                upper[k].bits =
                    static_cast<std::uint16_t>((u + ((u & 0xffffu) > threshold ? 0x10000u : 0u)) >> 16);
            }
        }
        p_words.store(param + i);
        if constexpr (rounding == Rounding::split) low_words.store(master + i);
    }
};

}  // namespace

void CudaBackend::adamw(Tensor param, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor factor,
                        const AdamWStep& step) {
    const i64 n = adamw_numel(param, master, m, v, grad);
    check::f32_values("adamw", "factor", factor, 1);
    const auto run = [&](auto p, auto g, auto rounding) {
        using P = decltype(p);
        using G = decltype(g);
        constexpr Rounding kind = decltype(rounding)::value;
        launch_elementwise<P>(stream(), n,
                              Update<P, G, kind>{param.as<P>(), master.as<std::int16_t>(), m.as<float>(),
                                                 v.as<float>(), grad.as<G>(), factor.as<float>(), step,
                                                 1.0f / step.correction1, 1.0f / step.correction2},
                              param.data, master.data, m.data, v.data, grad.data);
    };
    if (param.dtype == DType::f32)
        return run(float{}, float{}, std::integral_constant<Rounding, Rounding::none>{});
    visit_float(grad.dtype, [&](auto g) {
        if (master)
            run(bf16{}, g, std::integral_constant<Rounding, Rounding::split>{});
        else
            run(bf16{}, g, std::integral_constant<Rounding, Rounding::stochastic>{});
    });
}

}  // namespace llmc
