// AVX2 and FMA. bf16 is widened to f32 in packing.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#include "cpu/simd/vec_avx2.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
// 6 x 16: 12 accumulators, 2 vectors of B and 1 of A in 16 registers.
constexpr int kMR = 6, kNV = 2;
constexpr i64 kPart = 256, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("avx2");
}
const llmc::Kernels* llmc::kernels_avx2() { return &table; }
