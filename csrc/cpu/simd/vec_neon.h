// Vec: 4 floats in a NEON register (aarch64). See vec_scalar.h for the contract that every vec_*.h fulfils.
#pragma once

#include <arm_neon.h>

#include "core/bf16.h"

namespace {

using llmc::bf16;

struct Vec {
    static constexpr int W = 4;
    float32x4_t v;
};

inline Vec zero() { return {vdupq_n_f32(0.0f)}; }
inline Vec set1(float x) { return {vdupq_n_f32(x)}; }
inline uint32x4_t first(int n) {
    const std::int32_t lanes[4] = {0, 1, 2, 3};
    return vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lanes));
}

inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const float* p, int n) {
    float f[4] = {};
    for (int i = 0; i < n; ++i) f[i] = p[i];
    return {vld1q_f32(f)};
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(float* p, Vec a, int n) {
    float f[4];
    vst1q_f32(f, a.v);
    for (int i = 0; i < n; ++i) p[i] = f[i];
}
inline void stream(float* p, Vec a) { store(p, a); }

inline uint16x4_t load_halves(const void* p, int n) {
    std::uint16_t h[4] = {};
    for (int i = 0; i < n; ++i) h[i] = static_cast<const std::uint16_t*>(p)[i];
    return vld1_u16(h);
}
inline void store_halves(void* p, uint16x4_t a, int n) {
    std::uint16_t h[4];
    vst1_u16(h, a);
    for (int i = 0; i < n; ++i) static_cast<std::uint16_t*>(p)[i] = h[i];
}
inline Vec widen(uint16x4_t h) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
inline uint16x4_t narrow(Vec a) {
    const uint32x4_t u = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet), 16);
}
inline Vec load(const bf16* p) { return widen(vld1_u16(&p->bits)); }
inline Vec load(const bf16* p, int n) { return widen(load_halves(p, n)); }
inline void store(bf16* p, Vec a) { vst1_u16(&p->bits, narrow(a)); }
inline void store(bf16* p, Vec a, int n) { store_halves(p, narrow(a), n); }
inline void stream(bf16* p, Vec a) { store(p, a); }

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec scale2(Vec a, Vec n) {
    const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23);
    return {vmulq_f32(a.v, vreinterpretq_f32_s32(e))};
}
inline Vec keep_first(Vec a, int n, float fill) { return {vbslq_f32(first(n), a.v, vdupq_n_f32(fill))}; }

inline float sum(Vec a) {
    const float32x2_t q = vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
    return vget_lane_f32(q, 0) + vget_lane_f32(q, 1);
}
inline float max(Vec a) { return vmaxvq_f32(a.v); }

inline void transpose(Vec* r) {
    const float32x4x2_t a = vtrnq_f32(r[0].v, r[1].v), b = vtrnq_f32(r[2].v, r[3].v);
    r[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

inline Vec join(const bf16* high, const std::int16_t* low, int n) {
    const uint32x4_t h = vshll_n_u16(load_halves(high, n), 16);
    const int32x4_t l = vmovl_s16(vreinterpret_s16_u16(load_halves(low, n)));
    return {vreinterpretq_f32_u32(vaddq_u32(h, vreinterpretq_u32_s32(l)))};
}
inline void split(bf16* high, std::int16_t* low, Vec a, int n) {
    const uint32x4_t u = vreinterpretq_u32_f32(a.v);
    const uint32x4_t h = vshrq_n_u32(vaddq_u32(u, vdupq_n_u32(0x8000)), 16);
    store_halves(high, vmovn_u32(h), n);
    store_halves(low, vmovn_u32(vsubq_u32(u, vshlq_n_u32(h, 16))), n);
}

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}
inline void fence() {}

}  // namespace
