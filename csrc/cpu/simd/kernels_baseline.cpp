// What every CPU of the architecture has: SSE2 on x86-64, plain C++ elsewhere. bf16 is widened to f32 in
// packing.
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#if defined(__SSE2__) || defined(_M_X64)
#include "cpu/simd/vec_sse2.h"
#else
#include "cpu/simd/vec_scalar.h"
#endif
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
constexpr int kMR = 6, kNV = 2;
constexpr i64 kPart = 512, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

namespace {
constexpr llmc::Kernels table = make_kernels("baseline");
}
const llmc::Kernels* llmc::kernels_baseline() { return &table; }
