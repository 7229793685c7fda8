// A tile that fills the registers
//
// A multiply-add takes 4 cycles, and a CPU begins two in each: 8 have to be under way, and 8 sums were just as many, with
// nothing to spare for a load that comes late. Here a tile is 8 rows of 3 vectors where there are 32 registers (AVX-512, NEON), 6 rows
// of 2 where there are 16: the sums, the weights and one value of inp fill them. And loads get fewer: 11 for 24 multiply-adds,
// instead of 6 for 8.
#include <algorithm>
#include <vector>

#include "cpu/simd/unroll.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int kColumns = kVectors * Vec::W;

// Not inlined, because among the loops around it gcc runs out of registers and keeps a sum in memory.
template <int Rows>
LLMC_NOINLINE void tile(float* out, const float* inp, const float* strip, const float* bias, int64_t C,
                        int64_t OC, int columns) {
    Vec sum[Rows][kVectors];
    LLMC_UNROLL
    for (int i = 0; i < Rows; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
    }
    for (int64_t c = 0; c < C; ++c) {
        Vec w[kVectors];
        LLMC_UNROLL
        for (int j = 0; j < kVectors; ++j) w[j] = load(strip + c * kColumns + j * Vec::W);
        LLMC_UNROLL
        for (int i = 0; i < Rows; ++i) {
            LLMC_UNROLL
            for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(set1(inp[i * C + c]), w[j], sum[i][j]);
        }
    }
    LLMC_UNROLL
    for (int j = 0; j < kVectors; ++j) {
        const int lanes = std::clamp(columns - j * Vec::W, 0, Vec::W);
        LLMC_UNROLL
        for (int i = 0; i < Rows; ++i)
            store(out + i * OC + j * Vec::W, sum[i][j] + load(bias + j * Vec::W, lanes), lanes);
    }
}

}  // namespace

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    std::vector<float> strip(C * kColumns);
    for (int64_t o = 0; o < OC; o += kColumns) {
        const int columns = std::min<int64_t>(kColumns, OC - o);
        for (int64_t c = 0; c < C; ++c)
            for (int j = 0; j < kColumns; ++j)
                strip[c * kColumns + j] = j < columns ? weight[(o + j) * C + c] : 0.0f;
        int64_t n = 0;
        for (; n + kRows <= N; n += kRows)
            tile<kRows>(out + n * OC + o, inp + n * C, strip.data(), bias + o, C, OC, columns);
        for (; n < N; ++n) tile<1>(out + n * OC + o, inp + n * C, strip.data(), bias + o, C, OC, columns);
    }
}
