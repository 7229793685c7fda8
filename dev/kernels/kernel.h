// What a CPU kernel of this folder needs beside C++ itself. run.py compiles each version into a library of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "core/bf16.h"

// Before the function `run` of a version: makes it visible to run.py, under this name.
#if defined(_WIN32)
#define KERNEL extern "C" __declspec(dllexport)
#else
#define KERNEL extern "C" __attribute__((visibility("default")))
#endif

// bf16 is the upper half of a float: 8 bits of exponent, 7 of mantissa.
using llmc::bf16;

inline float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
// Rounded to the nearest; halves to the even neighbour. Not for NaN.
inline bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// run.py calls this before it calls `run`.
KERNEL void set_threads(int threads) {
#if defined(_OPENMP)
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}
