// AVX-512 F, BW, DQ, VL. bf16 is widened to f32 in packing.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
// 8 x 48: 24 accumulators, 3 vectors of B and 1 of A in 32 registers. Block sizes: doc/performance.md.
constexpr int kMR = 8, kNV = 3;
constexpr i64 kPart = 384, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("avx512");
}
const llmc::Kernels* llmc::kernels_avx512() { return &table; }
