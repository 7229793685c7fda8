// Vec: a vector of floats, as wide as the CPU has them, for the versions that spell out their vectors. csrc/cpu/simd/vec_scalar.h
// says what it can do; this header takes the one of the instruction set that the compiler was told to use.
#pragma once

#include "kernel.h"

#if defined(__AVX512BF16__)
#define LLMC_KERNEL_AVX512_BF16  // has an instruction that rounds to bf16
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "cpu/simd/vec_avx2.h"
#elif defined(__aarch64__)
#include "cpu/simd/vec_neon.h"
#else
#include "cpu/simd/vec_scalar.h"
#endif

// Calls body(i, n) for the vectors of `count` elements: the one that begins at i has n of them, W but in the last. load(p, n) and
// store(p, v, n) touch the first n only, so a length need not be a multiple of W.
template <class Body>
inline void for_vectors(std::int64_t count, Body body) {
    std::int64_t i = 0;
    for (; i + Vec::W <= count; i += Vec::W) body(i, Vec::W);
    if (i < count) body(i, static_cast<int>(count - i));
}
