// Vec for any machine: 4 floats in an array, for which the compiler uses the vectors that the machine has. It is also
// the contract. Every vec_*.h defines, in an unnamed namespace:
//   Vec, W lanes of f32;  load/store of f32 and bf16 (a bf16 store rounds to nearest even; with n, only the
//   first n <= W lanes are touched, and a load fills the rest with 0);  stream: a store past the caches, to
//   an aligned address;  arithmetic; fma(a,b,c) = a*b+c, fnma = c-a*b;  round to the nearest integer;
//   scale2(a,n) = a * 2^n for whole n in [-126, 127]; keep_first(a, n, fill): lanes from n on become fill;
//   sum and max over the lanes;  transpose of W rows; join/split: f32 <-> bf16 and the 16 bits below it
//   (core/master.h);  prefetch into L2;  fence after streams.
#pragma once

#include <math.h>
#include <string.h>

#include "core/bf16.h"

namespace {

using llmc::bf16;

struct Vec {
    static constexpr int W = 4;
    float v[W];
};

#define LLMC_LANES for (int i = 0; i < Vec::W; ++i)

inline Vec set1(float x) {
    Vec r;
    LLMC_LANES r.v[i] = x;
    return r;
}
inline Vec zero() { return set1(0.0f); }

inline float widen(bf16 h) {
    const std::uint32_t u = static_cast<std::uint32_t>(h.bits) << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
inline bf16 narrow(float x) {
    std::uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<std::uint16_t>((u >> 16) | 0x40u)};
    return bf16{static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline Vec load(const float* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
}
inline Vec load(const bf16* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
}
inline void store(float* p, Vec a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline void store(bf16* p, Vec a, int n) {
    for (int i = 0; i < n; ++i) p[i] = narrow(a.v[i]);
}
template <class T>
inline Vec load(const T* p) {
    return load(p, Vec::W);
}
template <class T>
inline void store(T* p, Vec a) {
    store(p, a, Vec::W);
}
template <class T>
inline void stream(T* p, Vec a) {
    store(p, a, Vec::W);
}

#define LLMC_LANEWISE(signature, expression)                                                                 \
    inline Vec signature {                                                                                   \
        Vec r;                                                                                               \
        LLMC_LANES r.v[i] = expression;                                                                      \
        return r;                                                                                            \
    }
LLMC_LANEWISE(operator+(Vec a, Vec b), a.v[i] + b.v[i])
LLMC_LANEWISE(operator-(Vec a, Vec b), a.v[i] - b.v[i])
LLMC_LANEWISE(operator*(Vec a, Vec b), a.v[i] * b.v[i])
LLMC_LANEWISE(operator/(Vec a, Vec b), a.v[i] / b.v[i])
LLMC_LANEWISE(fma(Vec a, Vec b, Vec c), a.v[i] * b.v[i] + c.v[i])
LLMC_LANEWISE(fnma(Vec a, Vec b, Vec c), c.v[i] - a.v[i] * b.v[i])
LLMC_LANEWISE(max(Vec a, Vec b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
LLMC_LANEWISE(min(Vec a, Vec b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
LLMC_LANEWISE(sqrt(Vec a), sqrtf(a.v[i]))
LLMC_LANEWISE(round(Vec a), nearbyintf(a.v[i]))
LLMC_LANEWISE(scale2(Vec a, Vec n), ldexpf(a.v[i], static_cast<int>(n.v[i])))
LLMC_LANEWISE(keep_first(Vec a, int n, float fill), i < n ? a.v[i] : fill)
#undef LLMC_LANEWISE
#undef LLMC_LANES

inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float max(Vec a) {
    const float p = a.v[0] > a.v[2] ? a.v[0] : a.v[2], q = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return p > q ? p : q;
}

inline void transpose(Vec* r) {
    for (int i = 0; i < Vec::W; ++i)
        for (int j = 0; j < i; ++j) {
            const float x = r[i].v[j];
            r[i].v[j] = r[j].v[i];
            r[j].v[i] = x;
        }
}

inline Vec join(const bf16* high, const std::int16_t* low, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) {
        const std::uint32_t u =
            (static_cast<std::uint32_t>(high[i].bits) << 16) + static_cast<std::uint32_t>(low[i]);
        memcpy(&r.v[i], &u, sizeof u);
    }
    return r;
}
inline void split(bf16* high, std::int16_t* low, Vec a, int n) {
    for (int i = 0; i < n; ++i) {
        std::uint32_t u;
        memcpy(&u, &a.v[i], sizeof u);
        const std::uint32_t h = (u + 0x8000u) >> 16;
        high[i].bits = static_cast<std::uint16_t>(h);
        low[i] = static_cast<std::int16_t>(static_cast<std::uint16_t>(u - (h << 16)));
    }
}

inline void prefetch(const void*) {}
inline void fence() {}

}  // namespace
