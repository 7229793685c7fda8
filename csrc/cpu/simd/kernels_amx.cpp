// AMX-BF16 (Intel Sapphire Rapids and later): avx512_bf16's conversions, and tiles for matmuls and attention in bf16.
// bf16 matmuls of few rows (matvec) and everything in f32 are as in avx512. The bf16 dot-product instruction is not
// used: on these CPUs it runs at half the rate of f32.
#include <math.h>

#if !defined(LLMC_AMX_EMULATION)
#define LLMC_KERNEL_AVX512_BF16
#endif
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
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

#include "cpu/simd/amx_tiles.h"
#include "cpu/simd/amx_gemm.h"
#include "cpu/simd/amx_attention.h"

namespace {
constexpr llmc::Kernels with_tiles(llmc::Kernels k) {
    k.bf16_arithmetic = true;
    llmc::TypedKernels<bf16>& t = k.bf16_;
    t.gemm = tile_gemm;
    t.gemm_scratch = tile_gemm_scratch;
    t.gemm_task = tile_gemm_task;
    t.packed_bytes = packed_weight_bytes;
    t.pack_weight = pack_weight;
    t.few_rows = 8;
    t.multiply_adds = tile_multiply_adds;
    t.attention_forward = tile_attention_forward;
    t.attention_forward_scratch = tile_attention_forward_scratch;
    t.attention_backward = tile_attention_backward;
    t.attention_backward_scratch = tile_attention_backward_scratch;
    return k;
}
constexpr llmc::Kernels table = with_tiles(make_kernels("amx"));
}  // namespace
const llmc::Kernels* llmc::kernels_amx() { return &table; }
