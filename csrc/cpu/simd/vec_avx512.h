// Vec: 16 floats in a zmm register (AVX-512 F, BW, DQ, VL). See vec_scalar.h for the contract that every
// vec_*.h fulfils.
#pragma once

#include <immintrin.h>

#include "core/bf16.h"

namespace {

using llmc::bf16;

struct Vec {
    static constexpr int W = 16;
    __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline __mmask16 first(int n) { return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(n))); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }

inline __m512 widen(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
#if defined(LLMC_KERNEL_AVX512_BF16)
inline __m256i narrow(Vec a) {
#if defined(_MSC_VER) && !defined(__clang__)
    return _mm512_cvtneps_pbh(a.v);  // there __m256bh is __m256i
#else
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#endif
}
inline void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
#else
inline __m512i rounded_to_bf16(Vec a) {  // the bits, a lane each
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
}
inline __m256i narrow(Vec a) { return _mm512_cvtepi32_epi16(rounded_to_bf16(a)); }
// One intrinsic narrows and stores, because clang 22 miscompiles two: if n is known to be 1, it writes the lane's 32 bits,
// two elements (github.com/llvm/llvm-project/issues/179489).
inline void store(bf16* p, Vec a, int n) {
    _mm512_mask_cvtepi32_storeu_epi16(p, first(n), rounded_to_bf16(a));
}
#endif
inline Vec load(const bf16* p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const bf16* p, int n) { return {widen(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec keep_first(Vec a, int n, float fill) {
    return {_mm512_mask_blend_ps(first(n < 0 ? 0 : n > 16 ? 16 : n), _mm512_set1_ps(fill), a.v)};
}

// Halves added pairwise: a fixed tree.
inline float sum(Vec a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline void transpose(Vec* r) {
    __m512i x[16], t[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_castps_si512(r[i].v);
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        r[j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[j], t[8 + j], 0x88));
        r[8 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd));
        r[4 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88));
        r[12 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd));
    }
}

// The f32 whose upper half, rounded half away from zero, is `high`: and back.
inline Vec join(const bf16* high, const std::int16_t* low, int n) {
    const __m512i h = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), high)), 16);
    const __m512i l = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(first(n), low));
    return {_mm512_castsi512_ps(_mm512_add_epi32(h, l))};
}
inline void split(bf16* high, std::int16_t* low, Vec a, int n) {
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i h = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x8000)), 16);
    _mm256_mask_storeu_epi16(high, first(n), _mm512_cvtepi32_epi16(h));
    _mm256_mask_storeu_epi16(low, first(n),
                             _mm512_cvtepi32_epi16(_mm512_sub_epi32(u, _mm512_slli_epi32(h, 16))));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void fence() { _mm_sfence(); }

}  // namespace
