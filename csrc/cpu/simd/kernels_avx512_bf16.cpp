// AVX-512 with the bf16 dot product (AMD Zen 4 and later, Intel Cooper Lake and Sapphire Rapids). vdpbf16ps
// multiplies two pairs per lane. On AMD that is twice the arithmetic of f32, on Intel half of it, so there
// avx512 or amx is chosen instead.
#include <math.h>

#define LLMC_KERNEL_AVX512_BF16
#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
constexpr int kMR = 8, kNV = 3;
constexpr i64 kPart = 384, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {

struct MultiplyPairs {
    using T = bf16;
    using Unit = std::uint32_t;
    using Left = bf16;
    static constexpr int kPerUnit = 2;

    static __m512bh bits(__m512i x) {
#if defined(_MSC_VER) && !defined(__clang__)
        return x;
#else
        return (__m512bh)x;
#endif
    }
    static Vec multiply_add(Vec a, Vec b, Vec c) {
        return {_mm512_dpbf16_ps(c.v, bits(_mm512_castps_si512(a.v)), bits(_mm512_castps_si512(b.v)))};
    }
    static Vec multiply_add(const Unit* a, Vec b, Vec c) {
        return multiply_add(Vec{_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*a)))}, b, c);
    }
    static Vec load_k(const T* p, int n) {  // n <= 32 elements, a pair to a lane
        if (n == 32) return {_mm512_castsi512_ps(_mm512_loadu_si512(p))};
        const __mmask32 mask = _bzhi_u32(0xffffffffu, static_cast<unsigned>(n));
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
    }
    static Vec load_n(const T* p, i64 ld, int present, int n) {  // rows p and p + ld, interleaved
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
        if (present == 1) return {_mm512_castsi512_ps(low)};
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p + ld));
        return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
    }
    static void store_pairs(Unit* out, Vec low, Vec high) {
        const __m512i a = _mm512_cvtepu16_epi32(narrow(low)), b = _mm512_cvtepu16_epi32(narrow(high));
        _mm512_storeu_si512(out, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
};

using MultiplyBf16 = MultiplyPairs;
}  // namespace
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("avx512_bf16");
}
const llmc::Kernels* llmc::kernels_avx512_bf16() { return &table; }
