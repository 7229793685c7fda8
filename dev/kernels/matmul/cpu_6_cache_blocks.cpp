// Blocks that fit the caches
//
// The reduction is cut into stretches of 384, rows into blocks of 192. What is used again soon, lies near (Goto and van de
// Geijn 2008):
//   for a stretch of the reduction     all strips of the weight are packed: they pass through L3
//     for a block of rows              packed too, in panels of kRows: it stays in L2
//       for a strip of the weight      it stays in L1, or close to it
//         for a panel                  the micro-kernel: sums in registers, both operands read in order
// Between stretches sums wait in out. Packed operands are padded with zeros, so that the micro-kernel knows no edge.
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
constexpr int64_t kStretch = 384, kBlock = 192;

// out[c][i] = from[i][c] for `width` rows, of which `rows` exist.
template <int width>
void pack(float* out, const float* from, int64_t ld, int64_t rows, int64_t depth) {
    constexpr int W = Vec::W;
    for (int i0 = 0; i0 < width; i0 += W) {
        const int lanes = std::min(W, width - i0);
        for (int64_t c = 0; c < depth; c += W) {
            const int n = static_cast<int>(std::min<int64_t>(W, depth - c));
            Vec square[W];
            for (int i = 0; i < W; ++i)
                square[i] = i0 + i < rows && i < lanes ? load(from + (i0 + i) * ld + c, n) : zero();
            transpose(square);
            for (int k = 0; k < n; ++k) store(out + (c + k) * width + i0, square[k], lanes);
        }
    }
}

// out (rows x columns) = bias, or what is there, + panel strip.
LLMC_NOINLINE void micro_kernel(float* out, int64_t ld, const float* panel, const float* strip,
                                const float* bias, int64_t depth, int rows, int columns) {
    Vec sum[kRows][kVectors];
    LLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
    }
    for (int64_t c = 0; c < depth; ++c, panel += kRows, strip += kColumns) {
        Vec w[kVectors];
        LLMC_UNROLL
        for (int j = 0; j < kVectors; ++j) w[j] = load(strip + j * Vec::W);
        LLMC_UNROLL
        for (int i = 0; i < kRows; ++i) {
            LLMC_UNROLL
            for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(set1(panel[i]), w[j], sum[i][j]);
        }
    }
    float sums[kRows][kColumns];  // an array that can be indexed, as registers cannot
    LLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < kVectors; ++j) store(sums[i] + j * Vec::W, sum[i][j]);
    }
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) out[i * ld + j] = sums[i][j] + (bias ? bias[j] : out[i * ld + j]);
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    std::vector<float> strips(kStretch * round_up(OC, kColumns)), block(kStretch * round_up(kBlock, kRows));
    for (int64_t c = 0; c < C; c += kStretch) {
        const int64_t depth = std::min(kStretch, C - c);
        for (int64_t o = 0; o < OC; o += kColumns)
            pack<kColumns>(strips.data() + o * depth, weight + o * C + c, C, OC - o, depth);
        for (int64_t n = 0; n < N; n += kBlock) {
            const int64_t rows = std::min(kBlock, N - n);
            for (int64_t i = 0; i < rows; i += kRows)
                pack<kRows>(block.data() + i * depth, inp + (n + i) * C + c, C, rows - i, depth);
            for (int64_t o = 0; o < OC; o += kColumns)
                for (int64_t i = 0; i < rows; i += kRows)
                    micro_kernel(out + (n + i) * OC + o, OC, block.data() + i * depth,
                                 strips.data() + o * depth, c == 0 ? bias + o : nullptr, depth,
                                 std::min<int64_t>(kRows, rows - i), std::min<int64_t>(kColumns, OC - o));
        }
    }
}
