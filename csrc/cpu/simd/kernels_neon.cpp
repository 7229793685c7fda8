// NEON (every aarch64). bf16 is widened to f32 in packing.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#include "cpu/simd/vec_neon.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
// 8 x 12: 24 accumulators, 3 vectors of B and 1 of A in 32 registers.
constexpr int kMR = 8, kNV = 3;
constexpr i64 kPart = 512, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("neon");
}
const llmc::Kernels* llmc::kernels_neon() { return &table; }
