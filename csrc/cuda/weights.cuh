// What optimizers share: weights as they are kept, in f32, in bf16 alone, or in bf16 with the bits below as master.
#pragma once

#include <limits>

#include "cuda/device.cuh"

namespace llmc {

enum class Rounding { none, stochastic, split };  // f32; bf16 alone; bf16 with its lower half as master

// llm.c's lerp: start + weight (end - start), as two fused multiply-adds.
__device__ __forceinline__ float interpolate(float start, float end, float weight) {
    return fmaf(weight, end, fmaf(-weight, start, start));
}

// Of a clip factor, which is not if the norm of the gradients was not.
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= std::numeric_limits<float>::max(); }

// SquirrelNoise5 (Squirrel Eiserloh, eiserloh.net/noise/SquirrelNoise5.hpp, CC BY 3.0 US): a hash of an index and a
// seed that passes for random bits.
__device__ __forceinline__ std::uint32_t squirrel_noise5(std::uint32_t index, std::uint32_t seed) {
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

// W weights from element i on; master is null unless they are split.
template <int W, Rounding rounding, class P>
__device__ __forceinline__ Floats<W> load_weights(const P* param, const std::int16_t* master, i64 i) {
    if constexpr (rounding == Rounding::split) {  // join_master of core/master.h
        Packed<W, P> upper_words;
        Packed<W, std::int16_t> lower_words;
        upper_words.load(param + i), lower_words.load(master + i);
        const P* const upper = reinterpret_cast<const P*>(upper_words.words);
        const std::int16_t* const lower = reinterpret_cast<const std::int16_t*>(lower_words.words);
        Floats<W> w;
#pragma unroll
        for (int k = 0; k < W; ++k)
            w[k] = __uint_as_float((static_cast<std::uint32_t>(upper[k].bits) << 16) +
                                   static_cast<std::uint32_t>(static_cast<std::int32_t>(lower[k])));
        return w;
    } else {
        return load<W>(param + i);
    }
}

// first, seed: of stochastic rounding, which goes by the place first + i.
template <Rounding rounding, int W, class P>
__device__ __forceinline__ void store_weights(P* param, std::int16_t* master, i64 i, const Floats<W>& w,
                                              std::uint32_t first, std::uint32_t seed) {
    if constexpr (rounding == Rounding::none) {
        store(param + i, w);
    } else {
        Packed<W, P> upper_words;
        Packed<W, std::int16_t> lower_words;
        P* const upper = reinterpret_cast<P*>(upper_words.words);
        std::int16_t* const lower = reinterpret_cast<std::int16_t*>(lower_words.words);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const std::uint32_t u = __float_as_uint(w[k]);
            if constexpr (rounding == Rounding::split) {  // split_master of core/master.h
                const std::uint32_t rounded = (u + 0x8000u) >> 16;
                upper[k].bits = static_cast<std::uint16_t>(rounded);
                lower[k] = static_cast<std::int16_t>(static_cast<std::uint16_t>(u - (rounded << 16)));
            } else {
                // Up with the probability of the part that is cut off: small updates are not lost on average.
                const std::uint32_t threshold =
                    squirrel_noise5(first + static_cast<std::uint32_t>(i + k), seed) & 0xffffu;
                upper[k].bits =
                    static_cast<std::uint16_t>((u + ((u & 0xffffu) > threshold ? 0x10000u : 0u)) >> 16);
            }
        }
        upper_words.store(param + i);
        if constexpr (rounding == Rounding::split) lower_words.store(master + i);
    }
}

}  // namespace llmc
