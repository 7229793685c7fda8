// Vec: 8 floats in a ymm register (AVX2 and FMA). See vec_scalar.h for the contract that every vec_*.h
// fulfils.
#pragma once

#include <immintrin.h>

#include "core/bf16.h"

namespace {

using llmc::bf16;

struct Vec {
    static constexpr int W = 8;
    __m256 v;
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }

inline __m256 widen(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
// One half of each of 8 dwords: the low one if BYTE is 0, the high one if it is 2.
template <int BYTE>
inline __m128i halves(__m256i u) {
    const __m256i p =
        _mm256_shuffle_epi8(u, _mm256_set1_epi64x(0x0d0c090805040100 + BYTE * 0x0101010101010101));
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(p, 0x08));
}
inline __m128i narrow(Vec a) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    return halves<2>(_mm256_blendv_epi8(rounded, quiet, nan));
}
inline __m128i load_halves(const void* p, int n) {
    alignas(16) std::uint16_t h[8] = {};
    for (int i = 0; i < n; ++i) h[i] = static_cast<const std::uint16_t*>(p)[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(h));
}
inline void store_halves(void* p, __m128i a, int n) {
    alignas(16) std::uint16_t h[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(h), a);
    for (int i = 0; i < n; ++i) static_cast<std::uint16_t*>(p)[i] = h[i];
}
inline Vec load(const bf16* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const bf16* p, int n) { return n == 8 ? load(p) : Vec{widen(load_halves(p, n))}; }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline void store(bf16* p, Vec a, int n) {
    if (n == 8) return store(p, a);
    store_halves(p, narrow(a), n);
}
inline void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale2(Vec a, Vec n) {
    const __m256i e =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
inline Vec keep_first(Vec a, int n, float fill) {
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), a.v, _mm256_castsi256_ps(first(n)))};
}

inline float sum(Vec a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float max(Vec a) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

inline void transpose(Vec* r) {
    __m256 t[8], x[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
    }
    for (int i = 0; i < 2; ++i) {
        x[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        x[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        x[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        x[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
        r[j].v = _mm256_permute2f128_ps(x[j], x[4 + j], 0x20);
        r[4 + j].v = _mm256_permute2f128_ps(x[j], x[4 + j], 0x31);
    }
}

inline Vec join(const bf16* high, const std::int16_t* low, int n) {
    const __m256i h = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(high, n)), 16);
    return {_mm256_castsi256_ps(_mm256_add_epi32(h, _mm256_cvtepi16_epi32(load_halves(low, n))))};
}
inline void split(bf16* high, std::int16_t* low, Vec a, int n) {
    const __m256i u = _mm256_castps_si256(a.v);
    store_halves(high, halves<2>(_mm256_add_epi32(u, _mm256_set1_epi32(0x8000))), n);
    store_halves(low, halves<0>(u), n);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void fence() { _mm_sfence(); }

}  // namespace
