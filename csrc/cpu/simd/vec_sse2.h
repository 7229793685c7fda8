// Vec: 4 floats in an xmm register (SSE2, which every x86-64 has; no FMA). See vec_scalar.h for the contract
// that every vec_*.h fulfils.
#pragma once

#include <emmintrin.h>

#include "core/bf16.h"

namespace {

using llmc::bf16;

struct Vec {
    static constexpr int W = 4;
    __m128 v;
};

inline Vec zero() { return {_mm_setzero_ps()}; }
inline Vec set1(float x) { return {_mm_set1_ps(x)}; }
inline __m128i first(int n) { return _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)); }
inline __m128i select(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

inline Vec load(const float* p) { return {_mm_loadu_ps(p)}; }
inline Vec load(const float* p, int n) {
    alignas(16) float f[4] = {};
    for (int i = 0; i < n; ++i) f[i] = p[i];
    return {_mm_load_ps(f)};
}
inline void store(float* p, Vec a) { _mm_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) {
    alignas(16) float f[4];
    _mm_store_ps(f, a.v);
    for (int i = 0; i < n; ++i) p[i] = f[i];
}
inline void stream(float* p, Vec a) { _mm_stream_ps(p, a.v); }

inline __m128i load_halves(const void* p, int n) {
    if (n == 4) return _mm_loadl_epi64(static_cast<const __m128i*>(p));
    alignas(16) std::uint16_t h[8] = {};
    for (int i = 0; i < n; ++i) h[i] = static_cast<const std::uint16_t*>(p)[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(h));
}
inline void store_halves(void* p, __m128i a) {  // the low halves of 4 dwords
    // Signed saturation keeps the bits if the halves are sign-extended first: SSE2 has no unsigned pack of
    // dwords.
    const __m128i h = _mm_srai_epi32(_mm_slli_epi32(a, 16), 16);
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi32(h, h));
}
inline void store_halves(void* p, __m128i a, int n) {
    if (n == 4) return store_halves(p, a);
    alignas(16) std::uint32_t d[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(d), a);
    for (int i = 0; i < n; ++i) static_cast<std::uint16_t*>(p)[i] = static_cast<std::uint16_t>(d[i]);
}
inline Vec widen(__m128i h) { return {_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h))}; }
inline __m128i narrow(Vec a) {
    const __m128i u = _mm_castps_si128(a.v);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
    const __m128i quiet = _mm_or_si128(u, _mm_set1_epi32(0x400000));
    return _mm_srli_epi32(select(_mm_castps_si128(_mm_cmpunord_ps(a.v, a.v)), quiet, rounded), 16);
}
inline Vec load(const bf16* p) { return widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const bf16* p, int n) { return widen(load_halves(p, n)); }
inline void store(bf16* p, Vec a) { store_halves(p, narrow(a)); }
inline void store(bf16* p, Vec a, int n) { store_halves(p, narrow(a), n); }
inline void stream(bf16* p, Vec a) { store(p, a); }

inline Vec operator+(Vec a, Vec b) { return {_mm_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
inline Vec max(Vec a, Vec b) { return {_mm_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm_min_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm_cvtepi32_ps(_mm_cvtps_epi32(a.v))}; }  // |a| < 2^31
inline Vec scale2(Vec a, Vec n) {
    const __m128i e = _mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n.v), _mm_set1_epi32(127)), 23);
    return {_mm_mul_ps(a.v, _mm_castsi128_ps(e))};
}
inline Vec keep_first(Vec a, int n, float fill) {
    return {_mm_castsi128_ps(select(first(n), _mm_castps_si128(a.v), _mm_castps_si128(_mm_set1_ps(fill))))};
}

inline float sum(Vec a) {
    const __m128 q = _mm_add_ps(a.v, _mm_movehl_ps(a.v, a.v));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float max(Vec a) {
    const __m128 q = _mm_max_ps(a.v, _mm_movehl_ps(a.v, a.v));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline void transpose(Vec* r) { _MM_TRANSPOSE4_PS(r[0].v, r[1].v, r[2].v, r[3].v); }

inline Vec join(const bf16* high, const std::int16_t* low, int n) {
    const __m128i h = _mm_unpacklo_epi16(_mm_setzero_si128(), load_halves(high, n));
    const __m128i l = _mm_srai_epi32(_mm_unpacklo_epi16(_mm_setzero_si128(), load_halves(low, n)), 16);
    return {_mm_castsi128_ps(_mm_add_epi32(h, l))};
}
inline void split(bf16* high, std::int16_t* low, Vec a, int n) {
    const __m128i u = _mm_castps_si128(a.v);
    const __m128i h = _mm_srli_epi32(_mm_add_epi32(u, _mm_set1_epi32(0x8000)), 16);
    store_halves(high, h, n);
    store_halves(low, _mm_sub_epi32(u, _mm_slli_epi32(h, 16)), n);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void fence() { _mm_sfence(); }

}  // namespace
