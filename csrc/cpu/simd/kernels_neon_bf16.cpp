// NEON with the bf16 dot product (Armv8.6: Apple M2, Neoverse V1 and later): two pairs per lane, as
// with AVX512-BF16.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#include "cpu/simd/vec_neon.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
constexpr int kMR = 8, kNV = 3;
constexpr i64 kPart = 512, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {

struct MultiplyPairs {
    using T = bf16;
    using Unit = std::uint32_t;
    using Left = bf16;
    static constexpr int kPerUnit = 2;

    static Vec multiply_add(Vec a, Vec b, Vec c) {
        return {vbfdotq_f32(c.v, vreinterpretq_bf16_f32(a.v), vreinterpretq_bf16_f32(b.v))};
    }
    static Vec multiply_add(const Unit* a, Vec b, Vec c) {
        return multiply_add(Vec{vreinterpretq_f32_u32(vdupq_n_u32(*a))}, b, c);
    }
    static Vec load_k(const T* p, int n) {
        if (n == 8) return {vreinterpretq_f32_u16(vld1q_u16(&p->bits))};
        std::uint16_t h[8] = {};
        for (int i = 0; i < n; ++i) h[i] = p[i].bits;
        return {vreinterpretq_f32_u16(vld1q_u16(h))};
    }
    static Vec load_n(const T* p, i64 ld, int present, int n) {
        const uint16x4_t low = load_halves(p, n);
        const uint16x4_t high = present == 1 ? vdup_n_u16(0) : load_halves(p + ld, n);
        return interleave(low, high);
    }
    static void store_pairs(Unit* out, Vec low, Vec high) {
        store(reinterpret_cast<float*>(out), interleave(narrow(low), narrow(high)));
    }
    static Vec interleave(uint16x4_t low, uint16x4_t high) {
        const uint16x4x2_t z = vzip_u16(low, high);
        return {vreinterpretq_f32_u16(vcombine_u16(z.val[0], z.val[1]))};
    }
};

using MultiplyBf16 = MultiplyPairs;
}  // namespace
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("neon_bf16");
}
const llmc::Kernels* llmc::kernels_neon_bf16() { return &table; }
